"""Inside a Megatron optimizer: its leaves, the model chunks, the way back to latents, Adam's steps.

Without Apex and Transformer Engine the inner optimizer is torch's, which increments a `step` tensor
per parameter in place. Megatron's DistributedOptimizer restores one and the same tensor for all:
each iteration then advances it once per parameter, and the bias correction is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch


def leaf_optimizers(optimizer: Any) -> list[Any]:
    """Return the Megatron optimizers inside a ChainedOptimizer, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def model_chunks(optimizer: Any) -> list[Any]:
    """Return the DDP-wrapped model chunks that distributed optimizers gather parameters of."""
    chunks: list[Any] = []
    for leaf in leaf_optimizers(optimizer):
        for chunk in getattr(leaf, "model_chunks", []):
            if all(chunk is not known for known in chunks):
                chunks.append(chunk)
    return chunks


def rewrite_model_params(optimizer: Any) -> None:
    """Let Megatron copy the main parameters into the model parameters, gathers included."""
    for leaf in leaf_optimizers(optimizer):
        if not leaf.is_stub_optimizer:
            leaf._copy_main_params_to_model_params()
    gather_model_params(optimizer)


def gather_model_params(optimizer: Any) -> None:
    """Complete the parameters, which overlapped gathers leave incomplete; collective.

    Whoever reads them between a step and the next forward must call this first.
    """
    for chunk in model_chunks(optimizer):
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        chunk.start_param_sync(force_sync=True)
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            # A forced sync marks the next overlapped gather as done already.
            group.param_gather_dispatched = False


def keep_adam_steps_apart(optimizer: Any) -> None:
    """Give every parameter its own `step` after each load from now on; may be called again."""
    for leaf in leaf_optimizers(optimizer):
        if isinstance(leaf.optimizer, torch.optim.Optimizer):
            leaf.optimizer.register_load_state_dict_pre_hook(_add_missing_steps)
            leaf.optimizer.register_load_state_dict_post_hook(_unshare_steps)


def _add_missing_steps(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    # Megatron does not store a step of 0.
    for state in state_dict["state"].values():
        if "exp_avg" in state:
            state.setdefault("step", torch.tensor(0.0))


def _unshare_steps(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@torch.no_grad()
def seed_adam_state(leaf: Any) -> None:
    """Give a leaf the state of step 0, which torch's Adam makes in its first step only."""
    inner = leaf.optimizer
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and not inner.state:
        leaf.init_state_fn(inner, leaf.config)
        for state in inner.state.values():
            state["step"] = torch.tensor(0.0)
