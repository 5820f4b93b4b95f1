"""The three constants of MiniCPM's muP, as they act in the forward pass.

    embedding     x = scale_emb * E[token]
    residual      x = x + scale_depth / sqrt(num_layers) * block(norm(x))
    logits        W (norm(x) / (hidden_size / dim_model_base))

They are carried in training and never folded into weights: folding would change what the optimizer
and the quantiser see. Source: MiniCPM (arXiv 2404.06395).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_bitcpm.arch.model import ModelConfig

XWithBias = tuple[torch.Tensor, torch.Tensor | None]


def residual_scale(model: ModelConfig) -> float:
    """Return the factor of what a block adds to the residual stream; 1 without muP."""
    if model.scale_depth is None:
        return 1.0
    return model.scale_depth / math.sqrt(model.num_layers)


def logits_divisor(model: ModelConfig) -> float:
    """Return the divisor of the hidden state before the output layer; 1 without muP."""
    return 1.0 if model.dim_model_base is None else model.hidden_size / model.dim_model_base


def scaled_bias_dropout_add(scale: float) -> Callable[..., Callable[..., torch.Tensor]]:
    """Return what Megatron calls in place of its bias-dropout-add: a scaled addition."""

    def get_scaled_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        def scaled_add(
            x_with_bias: XWithBias, residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            x, bias = x_with_bias
            assert bias is None and dropout == 0
            return residual + x * scale

        return scaled_add

    return get_scaled_add
