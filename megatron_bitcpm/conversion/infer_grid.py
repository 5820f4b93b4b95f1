"""Which grid and group size stored weights are on, found out from their values alone.

The answer for one tensor is the largest group size for which every group is on a grid; of grids
that fit equally large groups the one with the fewest levels. Every divisor of an answer fits too,
so a model trained with groups of 64 can only be told from one with groups of 32 because scales of
neighbouring groups differ: that all of them agree by chance does not happen in real weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_bitcpm.conversion.codes import CodeCount, count_not_finite, read_codes
from megatron_bitcpm.quant.grids import GRIDS, Grid
from megatron_bitcpm.quant.groups import list_divisors

MIN_GROUP = 4
"""Smaller groups are not looked for: any few values fit some grid."""
_SAMPLE_ROWS = 8
_FIRST_ROWS = 64


@dataclass(frozen=True)
class FoundGrid:
    """What the values of one tensor are on, and its codes there."""

    grid: Grid
    weights_per_scale: int
    count: CodeCount


def grids_by_levels() -> list[Grid]:
    """Return all grids, those with the fewest levels first.

    Values of asym4 without a single -2, the usual case, count as ternary.
    """
    return sorted(GRIDS.values(), key=lambda grid: (len(grid.codes), -grid.code_unit))


def infer_grid(
    w_OI: torch.Tensor,
    eps: float,
    hint: FoundGrid | None = None,
    folded: bool = False,
    grids: Sequence[Grid] | None = None,
) -> FoundGrid | None:
    """Return the grid of a finite tensor, [O, I], and its group size; None where it is on none.

    Args:
        hint: the answer for another tensor, which saves the search where it fits.
        folded: the values were multiplied with a constant and rounded a second time.
        grids: those to look for, the first that fits counts; default all.
    """
    grids = grids_by_levels() if grids is None else grids
    if is_zero(w_OI):
        return None
    in_features = w_OI.shape[1]
    if hint is not None and hint.weights_per_scale >= in_features and hint.grid in grids:
        found = _try(w_OI, hint.grid, in_features, eps, folded)
        if found is not None:
            return _widen(w_OI, found, eps, folded)
    sample = _sample_rows(w_OI)
    sizes = [s for s in reversed(list_divisors(in_features)) if s >= MIN_GROUP]
    if sizes and _count_magnitudes(sample.reshape(-1, sizes[-1])) > 2:
        # Larger groups made of these cannot hold fewer: of latents nearly all sizes are ruled out.
        sizes = [s for s in sizes if s % sizes[-1]]
    for size in sizes:
        if _count_magnitudes(sample.reshape(-1, size)) > 2:
            continue
        for grid in grids:
            if _try(sample, grid, size, eps, folded) is None:
                continue
            found = _try(w_OI, grid, size, eps, folded)
            if found is not None:
                return _widen(w_OI, found, eps, folded)
    return None


def lies_on_grid(w_OI: torch.Tensor, eps: float, folded: bool = False) -> bool:
    """Whether a weight, [O, I], was quantised already; judged by its first rows."""
    first_OI = w_OI[:_FIRST_ROWS]
    return not count_not_finite(first_OI) and infer_grid(first_OI, eps, None, folded) is not None


def is_zero(w: torch.Tensor) -> bool:
    """Whether a finite tensor holds only zeros; faster than torch's `any` of bfloat16."""
    low, high = torch.aminmax(w)
    return bool((low == 0) & (high == 0))


def _try(
    w_OI: torch.Tensor, grid: Grid, weights_per_scale: int, eps: float, folded: bool
) -> FoundGrid | None:
    count, bad = read_codes(w_OI, weights_per_scale, grid, eps, folded)
    return None if bad is not None else FoundGrid(grid, weights_per_scale, count)


def _widen(w_OI: torch.Tensor, found: FoundGrid, eps: float, folded: bool) -> FoundGrid:
    """Try one scale for the whole tensor where the rows are on the grid."""
    if found.weights_per_scale != w_OI.shape[1] or w_OI.shape[0] == 1:
        return found
    sample = _sample_rows(w_OI)
    if _try(sample, found.grid, sample.numel(), eps, folded) is None:
        return found
    return _try(w_OI, found.grid, w_OI.numel(), eps, folded) or found


def _sample_rows(w_OI: torch.Tensor) -> torch.Tensor:
    """Return a few rows from all over a tensor: what they rule out needs no full pass."""
    return w_OI[:: max(1, w_OI.shape[0] // _SAMPLE_ROWS)][:_SAMPLE_ROWS]


def _count_magnitudes(groups_NL: torch.Tensor) -> int:
    """Return the most magnitudes besides 0 that a group holds; 3 stands for more than 2."""
    rest_NL = groups_NL.float().abs()
    for found in range(3):
        top_N1 = rest_NL.amax(-1, keepdim=True)
        if not top_N1.any():
            return found
        rest_NL = torch.where(rest_NL < top_N1, rest_NL, 0.0)
    return 3
