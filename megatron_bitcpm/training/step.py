"""One pass of Megatron's schedule over a global batch; shared by the trainer and the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

Batches = Iterator[dict[str, torch.Tensor]]


def build_forward_step(device: torch.device) -> Callable[..., Any]:
    """Return the forward step that Megatron's schedules call with (iterator, model).

    The loss is the sum over tokens together with the count of tokens, so that micro-batches and
    data-parallel ranks weigh by their tokens.
    """

    def sum_loss(
        losses_BS: torch.Tensor, mask_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = (losses_BS.float() * mask_BS).sum()
        tokens = mask_BS.sum()
        return total, tokens.to(torch.int), {"loss": torch.stack([total.detach(), tokens])}

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = {key: value.to(device) for key, value in next(iterator).items()}
        losses_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses_BS, lambda output: sum_loss(output, batch["loss_mask"])

    return forward_step


def run_schedule(
    chunk: Any,
    forward_step: Callable[..., Any],
    batches: Batches,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool = False,
) -> float:
    """Run forward (and backward) over one global batch.

    Args:
        chunk: the DDP-wrapped model.
        forward_step: from `build_forward_step`.
        batches: this rank's micro-batches.
        num_microbatches: how many of them to take.
        micro_batch_size: sequences in each.
        seq_length: tokens in a sequence.
        forward_only: no gradients.

    Returns:
        The mean loss over all tokens of all data-parallel ranks, nats.
    """
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[chunk],
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    mine = torch.stack([output["loss"] for output in outputs]).float()
    everyone = [
        torch.empty_like(mine) for _ in range(parallel_state.get_data_parallel_world_size())
    ]
    # Gathered and added here: not every collectives library reduces float64.
    torch.distributed.all_gather(everyone, mine, group=parallel_state.get_data_parallel_group())
    loss_sum, tokens = torch.cat(everyone).cpu().double().sum(0).tolist()
    return float(loss_sum / tokens)
