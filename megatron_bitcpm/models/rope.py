"""Rotary position embeddings, plain and LongRoPE.

With p the position of a token, D the channels of a head and i = 0, 2, ..., D - 2:

    angle(p, i) = p / (factor[i / 2] * theta^(i / D))

Plain RoPE has all factors 1. LongRoPE has two measured arrays of factors, one for sequences up to
the original length and one for longer ones, and multiplies cos and sin by the attention factor

    sqrt(1 + ln(max / original) / ln(original))     (1 where max <= original)

of which each score gets the square; it is applied there, in the scale of the softmax.
Source: LongRoPE (arXiv 2402.13753); Phi-3 technical report; transformers' `longrope`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_bitcpm.arch.model import ModelConfig, attention_factor


def softmax_scale(model: ModelConfig) -> float:
    """Return the factor of the attention scores: 1 / sqrt(D), with LongRoPE's factor for both."""
    return attention_factor(model) ** 2 / math.sqrt(model.head_dim)


def rope_factors(model: ModelConfig, seq_length: int) -> list[float]:
    """Return the divisors of the frequencies, D / 2 numbers.

    One array serves the whole run: the short one when its sequences fit into the original length.
    (Transformers decides anew for each batch, by its length.)
    """
    rope = model.rope_scaling
    if rope is None:
        return [1.0] * (model.head_dim // 2)
    assert rope.original_max_position_embeddings is not None
    fits = seq_length <= rope.original_max_position_embeddings
    return list(rope.short_factor if fits else rope.long_factor)


class RotaryAngles(torch.nn.Module):
    """Takes the place of GPTModel's rotary embedding; the angles follow the position ids.

    `position_ids`, int64 [B, S], of this context-parallel rank's tokens, are set before a forward.
    """

    def __init__(self, model: ModelConfig, seq_length: int) -> None:
        super().__init__()
        exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device="cpu")
        factors = torch.tensor(rope_factors(model, seq_length), dtype=torch.float32, device="cpu")
        # No buffer: a model that is cast to bfloat16 needs exact frequencies all the same.
        self.frequencies = 1.0 / (factors * model.rotary_base ** (exponents / model.head_dim))
        self.position_ids: torch.Tensor | None = None

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """GPTModel asks this first; the position ids say it already."""
        assert self.position_ids is not None
        return self.position_ids.shape[1]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the angles, float32 [S, B, 1, D], both halves of the channels alike."""
        assert self.position_ids is not None, "position_ids are needed on every pipeline stage"
        self.frequencies = self.frequencies.to(self.position_ids.device)
        angles_SBD = self.position_ids.t().float().unsqueeze(-1) * self.frequencies
        return torch.cat((angles_SBD, angles_SBD), dim=-1).unsqueeze(2)
