"""What is inside a Megatron optimizer: its leaves, the model chunks, the way back to latents."""

from __future__ import annotations

from typing import Any


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
    """Complete the model parameters that distributed optimizers have written in part.

    While gathers overlap with the forward, parameters are incomplete between a step and the next
    forward: whoever reads them there, a checkpoint for example, must call this first. Collective
    over the data-parallel ranks; nothing happens with other optimizers.
    """
    for chunk in model_chunks(optimizer):
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        chunk.start_param_sync(force_sync=True)
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            # A forced sync marks the next overlapped gather as done already.
            group.param_gather_dispatched = False
