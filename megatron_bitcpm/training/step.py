"""One pass of Megatron's schedule over a global batch; shared by the trainer and the benchmark."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_bitcpm.training.objectives.base import Batches, Objective


def run_schedule(
    chunks: list[Any],
    objective: Objective,
    batches: Batches,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    device: torch.device,
    forward_only: bool = False,
) -> tuple[float, float]:
    """Run forward (and backward) over one global batch; collective over all ranks.

    Returns the sum of its losses, in nats, and the number of tokens that count.
    """
    iterators: Any = batches
    if len(chunks) > 1:
        # Every virtual stage reads all micro-batches.
        taken = list(itertools.islice(batches, num_microbatches))
        iterators = [iter(taken) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=objective.forward_step,
        data_iterator=iterators,
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    mine = torch.zeros(num_microbatches, 2, device=device)
    if outputs:  # the last pipeline stage
        mine = torch.stack([output["loss"] for output in outputs]).float()
    return _add_up(mine)


def _add_up(mine: torch.Tensor) -> tuple[float, float]:
    """Add (loss sum, tokens) pairs, float32 [micro-batches, 2] on the last pipeline stage."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    # Gathered and added here: not every collectives library reduces float64.
    torch.distributed.all_gather(everyone, mine, group=group)
    pairs = torch.cat(everyone)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            pairs,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    # What follows from the loss is decided by every rank for itself: to the last bit the same.
    torch.distributed.broadcast(pairs, 0)
    loss_sum, tokens = pairs.cpu().double().sum(0).tolist()
    return loss_sum, tokens
