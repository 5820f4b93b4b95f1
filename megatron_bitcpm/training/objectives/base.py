"""What the loop, the schedule and the evaluation need of an objective, and what objectives share.

A loss is a sum over tokens and their number, so that all parts of a batch weigh by their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from megatron.core import parallel_state

from megatron_bitcpm.models.context_parallel import slice_for_context_parallel

MicroBatch = dict[str, Any]
Batches = Iterator[MicroBatch]
TokenSum = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""What Megatron's schedules want: the loss sum to differentiate, the number of tokens (int), and
what to report, here ``loss``: float [2], the loss sum (in nats per token) and the tokens."""


class Objective(Protocol):
    """The loss of one micro-batch."""

    def forward_step(
        self, batches: Batches, model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], TokenSum]]:
        """Run a wrapped chunk on the next micro-batch; return its output, and the loss of that."""


def next_micro_batch(batches: Batches, device: torch.device) -> MicroBatch:
    """Take the next micro-batch: of each tensor this rank's piece of the sequences, [B, S].

    Only ``document_start`` stays whole and on the host, where attention plans its work.
    """
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    whole = dict(next(batches))
    document_start = whole.pop("document_start", None)
    mine = {k: slice_for_context_parallel(v, rank, size).to(device) for k, v in whole.items()}
    return {**mine, "document_start": document_start}


def sum_over_tokens(losses_BS: torch.Tensor, mask_BS: torch.Tensor) -> TokenSum:
    """Add up the losses of the tokens that count (mask 1)."""
    total, tokens = (losses_BS.float() * mask_BS).sum(), mask_BS.sum()
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach(), tokens])}
