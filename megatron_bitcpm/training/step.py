"""One pass of Megatron's schedule over a global batch; shared by the trainer and the benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_bitcpm.models.context_parallel import slice_for_context_parallel

Batches = Iterator[dict[str, torch.Tensor]]


def build_forward_step(device: torch.device) -> Callable[..., Any]:
    """Return the forward step that Megatron's schedules call with (iterator, model).

    The loss is the sum over tokens together with the count of tokens, so that micro-batches, pieces
    of sequences and data-parallel ranks weigh by their tokens.
    """

    def sum_loss(
        losses_BS: torch.Tensor, mask_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = (losses_BS.float() * mask_BS).sum()
        tokens = mask_BS.sum()
        return total, tokens.to(torch.int), {"loss": torch.stack([total.detach(), tokens])}

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = dict(next(iterator))
        # Attention needs the whole sequence's document bounds, on the host, where it plans its
        # work; of all else this rank's piece.
        document_start_BS = batch.pop("document_start", None)
        rank = parallel_state.get_context_parallel_rank()
        size = parallel_state.get_context_parallel_world_size()
        mine = {
            key: slice_for_context_parallel(value, rank, size).to(device)
            for key, value in batch.items()
        }
        losses_BS = model(
            mine["tokens"], mine["position_ids"], document_start_BS, labels=mine["labels"]
        )
        return losses_BS, lambda output: sum_loss(output, mine["loss_mask"])

    return forward_step


def run_schedule(
    chunks: list[Any],
    forward_step: Callable[..., Any],
    batches: Batches,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    device: torch.device,
    forward_only: bool = False,
) -> tuple[float, float]:
    """Run forward (and backward) over one global batch; collective over all ranks.

    Args:
        chunks: the wrapped model chunks of this rank.
        forward_step: from `build_forward_step`.
        batches: this rank's micro-batches.
        num_microbatches: how many of them to take.
        micro_batch_size: sequences in each.
        seq_length: tokens in a sequence.
        device: this rank's.
        forward_only: no gradients.

    Returns:
        The sum of the losses of the global batch's tokens that count, nats, and how many they are;
        the same on all ranks.
    """
    iterators: Any = batches
    if len(chunks) > 1:
        # Every virtual stage reads all micro-batches.
        taken = list(itertools.islice(batches, num_microbatches))
        iterators = [iter(taken) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
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
