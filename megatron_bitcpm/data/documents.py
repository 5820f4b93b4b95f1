"""Where documents begin inside a sample, and what follows from it: positions and the loss mask.

Stock GPTDataset has options for this; they loop over documents in Python and build a mask of S x S
numbers. Here one number a token says the same: a token attends from the first token of its
document to itself.
"""

from __future__ import annotations

import torch


def document_starts(tokens_S: torch.Tensor, eod: int) -> torch.Tensor:
    """Return the index of the first token of each token's document, [S] int64.

    A document ends with its end-of-document token, which belongs to it; what a sample begins with
    counts as a document even if its first part lies before the sample.
    """
    index_S = torch.arange(len(tokens_S))
    begins_S = torch.zeros_like(tokens_S, dtype=torch.bool)
    begins_S[1:] = tokens_S[:-1] == eod
    return torch.where(begins_S, index_S, 0).cummax(0).values


def add_document_fields(
    tokens_S: torch.Tensor,
    labels_S: torch.Tensor,
    eod: int,
    reset_attention_mask: bool,
    reset_position_ids: bool,
    eod_mask_loss: bool,
) -> dict[str, torch.Tensor]:
    """Return a sample: tokens and labels [S] int64 with all that the model derives from them.

    position_ids [S] int64, from the start of the document with `reset_position_ids`; loss_mask [S]
    float32, 1 or with `eod_mask_loss` 0 at `eod`; with `reset_attention_mask` document_start [S]
    int64. No tensor shares memory with another sample's.
    """
    index_S = torch.arange(len(tokens_S))
    sample = {"tokens": tokens_S, "labels": labels_S, "position_ids": index_S}
    if reset_attention_mask or reset_position_ids:
        starts_S = document_starts(tokens_S, eod)
        if reset_position_ids:
            sample["position_ids"] = index_S - starts_S
        if reset_attention_mask:
            sample["document_start"] = starts_S
    loss_mask_S = torch.ones(len(tokens_S))
    if eod_mask_loss:
        loss_mask_S[tokens_S == eod] = 0.0
    sample["loss_mask"] = loss_mask_S
    return sample
