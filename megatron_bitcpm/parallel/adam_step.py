"""A guard against one Adam `step` tensor shared by all parameters.

Without Apex and Transformer Engine the inner optimizer is torch's, which keeps `step` as a tensor
per parameter and increments it in place. Megatron's DistributedOptimizer restores a checkpoint by
putting one and the same tensor into every parameter's state: each iteration then advances it once
per parameter (5, 32, 59, ... with 27 parameters) and the bias correction is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch


def leaf_optimizers(optimizer: Any) -> list[Any]:
    """Return the Megatron optimizers inside a ChainedOptimizer, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def keep_adam_steps_apart(optimizer: Any) -> None:
    """Give every parameter its own `step` after each load from now on.

    Args:
        optimizer: a Megatron optimizer; the hook is set on torch's optimizers inside it.
    """
    for leaf in leaf_optimizers(optimizer):
        if isinstance(leaf.optimizer, torch.optim.Optimizer):
            leaf.optimizer.register_load_state_dict_post_hook(_unshare_steps)


def _unshare_steps(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
