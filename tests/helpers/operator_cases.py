"""What several tests give the operators."""

from __future__ import annotations

import pytest
import torch

GRIDS = ["ternary", "asym4", "half_sym4", "int_sym4", "five"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Lengths that end in every way a vector of 4, 8, 16, 32 or 64 lanes can.
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 95, 127, 128, 129, 130]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])


def random_weight(rows=8, cols=64, dtype=torch.float32):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)).to(dtype)


def make_activations(cols: int, dtype: torch.dtype, rows: int = 40) -> torch.Tensor:
    """Random tokens, and in the first ones zeros, tiny, huge, equal and non-finite values."""
    gen = torch.Generator().manual_seed(cols)
    x = torch.randn(rows, cols, generator=gen)
    x[rows // 2 :] *= torch.logspace(-6, 4, rows - rows // 2).unsqueeze(1)
    x[0], x[1], x[2], x[3] = 0.0, -0.0, 0.3, -1e-6
    x[4, cols // 2], x[5, 0], x[6, -1] = float("nan"), float("inf"), -float("inf")
    x[7] = torch.linspace(-127, 127, cols)
    x[7, 0] = 127.0  # scale 1 in exact arithmetic
    x[8] = torch.linspace(-63.5, 63.5, cols)
    x[8, 0] = 127.0
    x = x.to(dtype)
    x[9] = torch.finfo(dtype).max
    x[10, 1:] = torch.finfo(dtype).max / 300
    x[11] = torch.finfo(dtype).smallest_normal / 2
    return x
