"""Codes and fake-quantised weights of a grid with one scale per group: reference in pure torch.

For a group of weights along the inputs and its scale s (float32 arithmetic, no contraction):

    code = that of the nearest level: one comparison of |w| with midpoint * s per pair of levels
    wq   = level * s                                rounded once, to the dtype of w

For the ternary grid the comparison is ``2|w| > s``, so the code is clamp(rint(w / s), -1, 1), ties
to even, for every float32 input, without a division. ``w * (1 / s)`` is NOT equal: it flips codes
one ulp above s/2.

A group with a scale that is not positive and finite has codes 0 and NaN wq, and so has a weight
that is not finite. Zeros of wq are +0 and NaNs are the canonical quiet NaN, whatever the sign of w.

Source: BitCPM-CANN technical report, section 3.1, eqs. 1-2. The report leaves the order of the sum
and the rounding open; here they are fixed, see docs/quantizer.md. Levels live in `quant.grids`,
scales in `quant.scales`, the length of groups in `quant.groups`.

w is float32, bfloat16 or float16. Shape legend: O out, I in, G groups per row, of I / G inputs.
"""

from __future__ import annotations

import math

import torch

from megatron_bitcpm.quant.grids import TERNARY, Grid, find_grid
from megatron_bitcpm.quant.scales import compute_scales
from megatron_bitcpm.quant.settings import DEFAULT_EPS


def codes_from_scales(
    w_OI: torch.Tensor, scales_OG: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """Return int8 codes_OI, [O, I], of w under given float32 scales."""
    found = find_grid(grid)
    w_OGI = _split_groups(w_OI, scales_OG)
    magnitude_OGI = w_OGI.to(torch.float32).abs()
    positive_OGI = _count_up(magnitude_OGI, scales_OG, found, found.positive)
    if found.negative == tuple(-code for code in found.positive):
        negative_OGI = -positive_OGI
    else:
        negative_OGI = _count_up(magnitude_OGI, scales_OG, found, found.negative)
    codes_OGI = torch.where(w_OGI < 0, negative_OGI, positive_OGI)
    usable_OGI = w_OGI.isfinite() & _find_usable(scales_OG).unsqueeze(-1)
    return (codes_OGI * usable_OGI).reshape(w_OI.shape)


def fake_quantize_with_scales(
    w_OI: torch.Tensor, scales_OG: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """Return wq_OI = level * scale in the dtype of w, [O, I]."""
    codes_OGI = _split_groups(codes_from_scales(w_OI, scales_OG, grid), scales_OG)
    # An int8 zero has no sign: zeros of wq are +0. Code times unit is exact.
    levels_OGI = codes_OGI.to(torch.float32).mul_(find_grid(grid).code_unit)
    wq_OGI = levels_OGI.mul_(scales_OG.unsqueeze(-1)).to(w_OI.dtype)
    # Filled last: torch's vectorised float32 -> bfloat16 has another NaN than its scalar one.
    bad_OGI = ~(_split_groups(w_OI, scales_OG).isfinite() & _find_usable(scales_OG).unsqueeze(-1))
    return wq_OGI.masked_fill_(bad_OGI, math.nan).reshape(w_OI.shape)


def quantize(
    w_OI: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes_OI, int8, [O, I], and scales_OG, float32, [O, G], of a latent weight.

    Raises BitcpmError as `scales.compute_scales`.
    """
    scales_OG = compute_scales(w_OI, group_size, eps, grid)
    return codes_from_scales(w_OI, scales_OG, grid), scales_OG


def fake_quantize(
    w_OI: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> torch.Tensor:
    """Return wq_OI of a latent weight, as `fake_quantize_with_scales` with its own scales."""
    return fake_quantize_with_scales(w_OI, compute_scales(w_OI, group_size, eps, grid), grid)


def _count_up(
    magnitude_OGI: torch.Tensor, scales_OG: torch.Tensor, grid: Grid, side: tuple[int, ...]
) -> torch.Tensor:
    """Return the int8 code of `side` that each magnitude reaches, [O, G, inputs]."""
    scales_OG1 = scales_OG.unsqueeze(-1)
    codes_OGI = torch.full_like(magnitude_OGI, side[0], dtype=torch.int8)
    for code, midpoint in zip(side[1:], grid.find_midpoints(side), strict=True):
        if grid.is_ternary:
            # Doubling is exact where half of a subnormal scale would round.
            above_OGI = magnitude_OGI * 2 > scales_OG1
        else:
            above_OGI = magnitude_OGI > scales_OG1 * midpoint
        codes_OGI.masked_fill_(above_OGI, code)
    return codes_OGI


def _split_groups(x_OI: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    out_features, in_features = x_OI.shape
    num_groups = scales_OG.shape[1]
    return x_OI.reshape(out_features, num_groups, in_features // num_groups if num_groups else 0)


def _find_usable(scales_OG: torch.Tensor) -> torch.Tensor:
    return scales_OG.isfinite() & (scales_OG > 0)
