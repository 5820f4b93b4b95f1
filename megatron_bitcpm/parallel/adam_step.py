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


def unshare_adam_steps(optimizer: Any) -> None:
    """Give every parameter its own `step` now; call after each load.

    Args:
        optimizer: a Megatron optimizer.
    """
    for leaf in leaf_optimizers(optimizer):
        if leaf.optimizer is None:
            continue
        for state in leaf.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
