"""A guard against one Adam `step` tensor shared by all parameters.

Without Apex and Transformer Engine the inner optimizer is torch's, which keeps `step` as a tensor
per parameter and increments it in place. Megatron's DistributedOptimizer restores a checkpoint by
putting one and the same tensor into every parameter's state: each iteration then advances it once
per parameter (5, 32, 59, ... with 27 parameters) and the bias correction is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_bitcpm.parallel.optimizer_parts import leaf_optimizers


def keep_adam_steps_apart(optimizer: Any) -> None:
    """Give every parameter its own `step` after each load from now on; may be called again."""
    for leaf in leaf_optimizers(optimizer):
        if isinstance(leaf.optimizer, torch.optim.Optimizer):
            leaf.optimizer.register_load_state_dict_pre_hook(_add_missing_steps)
            leaf.optimizer.register_load_state_dict_post_hook(_unshare_steps)


def _add_missing_steps(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    # Megatron does not store a step of 0.
    del optimizer
    for state in state_dict["state"].values():
        if "exp_avg" in state:
            state.setdefault("step", torch.tensor(0.0))


def _unshare_steps(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@torch.no_grad()
def seed_adam_state(leaf: Any) -> None:
    """Give one of `leaf_optimizers` that has not stepped yet the state of step 0.

    Checkpoints describe the state by its tensors, which torch's Adam makes in its first step.
    """
    inner = leaf.optimizer
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and not inner.state:
        leaf.init_state_fn(inner, leaf.config)
        for state in inner.state.values():
            state["step"] = torch.tensor(0.0)
