"""Activations on an int8 grid, one scale per token: reference in pure torch.

For a token x of I values (float32 arithmetic, no contraction):

    m     = max(max(|x|), 1e-5)
    scale = (1 / m) * 127                          two roundings, as torch evaluates 127 / m
    x_q   = clamp(rint(x * scale), -128, 127) / scale        rounded once, to the dtype of x

rint rounds half to even. Bitwise the quantiser of activations in Transformers' AutoBitLinear
(transformers.integrations.bitnet), whose values BitNet checkpoints were trained with. A token with
a value that is not finite is NaN as a whole. Zeros keep the sign of x. Nothing is added to a
linear's output: it is the local input that is quantised.
"""

from __future__ import annotations

import math

import torch

SMALLEST_MAXIMUM = 1e-5
LARGEST_CODE = 127
SMALLEST_CODE = -128


def int8_per_token(x: torch.Tensor) -> torch.Tensor:
    """Return x_q of activations [..., I], in shape and dtype of x."""
    if not x.numel():
        return x.clone(memory_format=torch.contiguous_format)
    x32 = x.to(torch.float32)
    largest = x32.abs().amax(-1, keepdim=True)
    scale = largest.clamp(min=SMALLEST_MAXIMUM).reciprocal() * LARGEST_CODE
    codes = (x32 * scale).round().clamp(SMALLEST_CODE, LARGEST_CODE)
    return (codes / scale).to(x.dtype).masked_fill(~largest.isfinite(), math.nan)
