"""What a quantiser is told, in words and numbers; without torch.

A group size is a number of inputs, -1 for the whole row, or ``tensor`` for a whole Hugging Face
projection. Two arithmetics: ``fp32``, this package's (`quant.fake_quant`), and ``bf16_reciprocal``,
the one inferred for the released latents (`quant.reciprocal`).
"""

from __future__ import annotations

import contextlib

WHOLE_ROW = -1
TENSOR = "tensor"
FP32 = "fp32"
BF16_RECIPROCAL = "bf16_reciprocal"
NUMERICS = (FP32, BF16_RECIPROCAL)
DEFAULT_EPS = 1e-5
SMALLEST_EPS = 2.0**-126
"""Below the smallest normal float32 a scale would depend on flush-to-zero settings."""


def parse_group_size(value: object) -> int | str:
    """Return a configured group size; raises ValueError, saying what it must be."""
    if value == TENSOR:
        return TENSOR
    number = 0
    if isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            number = int(value)
    if number < 1 and number != WHOLE_ROW:
        raise ValueError("must be a whole number of at least 1, -1 for the whole row, or tensor")
    return number
