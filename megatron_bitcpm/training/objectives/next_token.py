"""Pretraining: the cross entropy of the next token, in nats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_bitcpm.training.objectives.base import (
    Batches,
    TokenSum,
    next_micro_batch,
    sum_over_tokens,
)


class NextToken:
    """An `Objective`; `device` is this rank's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def forward_step(
        self, batches: Batches, model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], TokenSum]]:
        """See `Objective`."""
        batch = next_micro_batch(batches, self._device)
        losses_BS = model(
            batch["tokens"], batch["position_ids"], batch["document_start"], labels=batch["labels"]
        )
        return losses_BS, lambda output: sum_over_tokens(output, batch["loss_mask"])
