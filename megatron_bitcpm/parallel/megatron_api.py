"""Where releases of megatron-core differ: one call for both, so that no other file asks.

Tested are 0.12.1, which MindSpeed stands on, and 0.16.1. Symbols of Megatron that must be
*replaced* on a release are data in `patching.core`; here is what is *called* differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel.agree import first_reason
from megatron_bitcpm.parallel.optimizer_parts import keep_adam_steps_apart
from megatron_bitcpm.patching.versions import megatron_version

M = TypeVar("M")


def tensor_parallel_group(linear: torch.nn.Module) -> torch.distributed.ProcessGroup:
    """Return the process group over which a Column- or RowParallelLinear is sharded."""
    # From 0.13 on it knows its group itself.
    if (group := getattr(linear, "tp_group", None)) is not None:
        return group
    if getattr(linear, "is_expert", False):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def get_optimizer(config: OptimizerConfig, chunks: list[Any]) -> MegatronOptimizer:
    """Build Megatron's optimizer for wrapped chunks; biases and vectors do not decay."""
    # Only newer releases have it here.
    if hasattr(config, "overlap_param_gather"):
        config.overlap_param_gather = chunks[0].ddp_config.overlap_param_gather
    _check_buckets(chunks)
    optimizer = get_megatron_optimizer(config, chunks)
    keep_adam_steps_apart(optimizer)
    return optimizer


def _check_buckets(chunks: list[Any]) -> None:
    """Refuse buckets that overlap, as 0.12 lays them out before a tied embedding; collective."""
    if megatron_version() >= (0, 13):
        return
    reason = None
    for buffer in (buffer for chunk in chunks for buffer in chunk.buffers):
        for start, end, bucket_id in buffer.param_index_map.values():
            bucket = buffer.buckets[bucket_id]
            if start < bucket.offset or end > bucket.offset + bucket.grad_data.numel():
                reason = "this megatron-core lays out overlapping buckets for this model"
    if reason := first_reason(reason):
        raise ModelError(
            f"parallel.ddp_bucket_size={chunks[0].ddp_config.bucket_size}: {reason}. Leave it out, "
            "untie the embeddings, or use megatron-core 0.16.1."
        )


def finalize_gradients(
    chunks: list[Any], num_tokens: torch.Tensor | None = None, **keywords: Any
) -> None:
    """Megatron's `finalize_model_grads`, dividing by the tokens of whole sequences.

    0.12 adds up the tokens of data-parallel ranks only, so that with context parallelism every
    gradient is too large by that size; clipping and Adam hide it in the loss.
    """
    if megatron_version() < (0, 13) and num_tokens is not None:
        torch.distributed.all_reduce(num_tokens, group=parallel_state.get_context_parallel_group())
    finalize_model_grads(chunks, num_tokens, **keywords)


def check_pipeline_config(config: Any) -> None:
    """Refuse the pipeline settings that train wrongly without an error.

    With virtual stages and batched point-to-point messages gradients reach the wrong chunk.
    Megatron's own command line refuses that; `megatron.core` does not look.
    """
    size = config.virtual_pipeline_model_parallel_size
    if size is None or (config.overlap_p2p_comm and not config.batch_p2p_comm):
        return
    raise ModelError(
        f"virtual_pipeline_model_parallel_size={size}: overlap_p2p_comm={config.overlap_p2p_comm}, "
        f"batch_p2p_comm={config.batch_p2p_comm} mixes up the gradients of virtual stages. Set "
        "overlap_p2p_comm=True and batch_p2p_comm=False in the TransformerConfig."
    )


@contextmanager
def virtual_stage(index: int) -> Iterator[None]:
    """Tell 0.12, which numbers a chunk's layers by a global, the chunk's position on this rank.

    Without it every chunk that is built or saved passes for the one that ran last.
    """
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
        yield
        return
    before = parallel_state.get_virtual_pipeline_model_parallel_rank()
    parallel_state.set_virtual_pipeline_model_parallel_rank(index)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_rank(before)


def build_pipeline_chunks(build: Callable[..., M]) -> list[M]:
    """Build this rank's part of a model: one chunk, or one for each virtual pipeline stage.

    `build` is called with ``pre_process`` (holds the embedding), ``post_process`` (holds the output
    layer) and, where Megatron's models take it, ``vp_stage``.
    """
    rank = parallel_state.get_pipeline_model_parallel_rank()
    last = parallel_state.get_pipeline_model_parallel_world_size() - 1
    size = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    chunks = []
    for stage in range(size or 1):
        keywords: dict[str, Any] = {
            "pre_process": rank == 0 and stage == 0,
            "post_process": rank == last and stage == (size or 1) - 1,
        }
        if size is not None and megatron_version() >= (0, 13):
            keywords["vp_stage"] = stage
        with virtual_stage(stage):
            chunks.append(build(**keywords))
    return chunks


def sharded_state_dict_of_chunks(chunks: list[Any]) -> dict[str, Any]:
    """Return the state dicts of this rank's unwrapped chunks as ``model0``, ``model1``, ..."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    result = {}
    for index, chunk in enumerate(chunks):
        with virtual_stage(index):
            result[f"model{index}"] = chunk.sharded_state_dict(metadata={"dp_cp_group": group})
    return result
