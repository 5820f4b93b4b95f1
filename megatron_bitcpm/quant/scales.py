"""Scales of groups: the mean or the largest of the absolute values, never below eps.

    abs_sum    s = max(sum(|w|) * float32(1 / n), eps)     n inputs in the group
    abs_max    s = max(max(|w|) / divisor, eps)            divisor of the grid, an IEEE division

All in float32 whatever the type of w. A sum has one order, `megatron_bitcpm.quant.sums`; a maximum
needs none. Both keep NaN: a group whose sum or maximum is not finite has a NaN scale, so that a
diverging run is seen.

Shape legend: O out, I in, G groups per row.
"""

from __future__ import annotations

import math

import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.grids import find_grid
from megatron_bitcpm.quant.groups import count_groups, resolve_group_size
from megatron_bitcpm.quant.settings import DEFAULT_EPS, SMALLEST_EPS
from megatron_bitcpm.quant.sums import sum_abs_canonical


def check_eps(eps: float) -> None:
    """Raise BitcpmError unless eps is finite and at least 2^-126, the smallest normal float32."""
    if not SMALLEST_EPS <= eps <= 3.4e38:
        raise BitcpmError(
            f"eps={eps}: the smallest scale must be a positive normal float32. Use 1e-5."
        )


def abs_sums(w_OI: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """Sum absolute values per group in the canonical order: float32 sums_OG, [O, G]."""
    return sum_abs_canonical(w_OI, resolve_group_size(w_OI.shape[1], group_size))


def abs_maxima(w_OI: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """Return the largest absolute value per group: float32 [O, G], NaN where w has NaN."""
    num_groups = count_groups(w_OI.shape[1], group_size)
    if not num_groups:
        return w_OI.new_empty(w_OI.shape[0], 0, dtype=torch.float32)
    w_OGI = w_OI.reshape(w_OI.shape[0], num_groups, w_OI.shape[1] // num_groups)
    return w_OGI.to(torch.float32).abs().amax(-1)


def scales_from_sums(sums: torch.Tensor, n: int, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """Turn float32 sums of `n` absolute values each, any shape, into scales of that shape.

    `n` is the full row's length when sums of ranks were added. Raises BitcpmError for other sums,
    for n that is not an int >= 1, and as `check_eps`.
    """
    check_eps(eps)
    if sums.dtype != torch.float32:
        raise BitcpmError(f"sums.dtype={sums.dtype}: must be float32. Take them from abs_sums.")
    if not isinstance(n, int) or isinstance(n, bool):
        raise BitcpmError(f"n={n}: must be a whole number. Pass the group's length.")
    if n < 1:
        raise BitcpmError(f"n={n}: a mean needs at least one input. Pass the group's length.")
    return _bound_below(sums * _to_float32(1.0 / n, sums), eps, sums)


def scales_from_max(
    maxima: torch.Tensor, eps: float = DEFAULT_EPS, grid: str = "five"
) -> torch.Tensor:
    """Turn largest absolute values, float32 of any shape, >= 0 or NaN, into scales of that shape.

    Raises BitcpmError where the grid is unknown or its scale comes from sums, and as `check_eps`.
    """
    check_eps(eps)
    found = find_grid(grid)
    if found.statistic != "abs_max":
        raise BitcpmError(f"grid={grid}: its scale is a mean, not a maximum. Use scales_from_sums.")
    # A tensor as divisor: by a Python number, torch multiplies with the reciprocal on some devices.
    return _bound_below(maxima / torch.full_like(maxima, found.divisor), eps, maxima)


def compute_scales(w_OI: torch.Tensor, group_size: int, eps: float, grid: str) -> torch.Tensor:
    """Return scales_OG, float32, [O, G], of a latent weight.

    Raises BitcpmError as `check_eps`, `find_grid` and `groups.resolve_group_size`.
    """
    check_eps(eps)
    if find_grid(grid).statistic == "abs_max":
        return scales_from_max(abs_maxima(w_OI, group_size), eps, grid)
    group_len = resolve_group_size(w_OI.shape[1], group_size)
    return scales_from_sums(abs_sums(w_OI, group_size), max(group_len, 1), eps)


def _bound_below(scales: torch.Tensor, eps: float, statistic: torch.Tensor) -> torch.Tensor:
    bounded = scales.clamp(min=_to_float32(eps, scales))
    return bounded.masked_fill(~statistic.isfinite(), math.nan)


def _to_float32(value: float, like: torch.Tensor) -> torch.Tensor:
    # A tensor, not a Python number, which some devices keep in double precision.
    return torch.full((), value, dtype=torch.float32, device=like.device)
