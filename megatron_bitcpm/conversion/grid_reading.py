"""Codes and scales read back out of stored values, and whether these are on a grid at all.

A value on a grid is level * scale, rounded to the type it is stored in. Nothing tells the scale but
the values themselves, so a group is read by its magnitudes: in every grid it holds at most two
besides 0, and two must be roundings of one scale's levels. The larger one stands for the group's
scale; a group of zeros has none.

Everything works on bit patterns: of two floats of one sign the larger one has the larger pattern.
Tensors are taken in blocks that fit the processor's cache.

Shape legend: O out, I in, N groups, L inputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_bitcpm.quant.grids import Grid, find_grid

_INTEGERS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
    torch.float32: (torch.int32, np.uint32),
}
"""Integers of the size of a type, of torch and of NumPy."""
_BLOCK = 1 << 18
"""Values of a block: half a megabyte of bfloat16."""

Bits = npt.NDArray[np.unsignedinteger[Any]]


@dataclass
class CodeCount:
    """Totals over tensors on a grid.

    Attributes:
        grid: the grid.
        tensors, groups, weights: how many.
        codes: stored code -> weights that have it.
    """

    grid: Grid
    tensors: int = 0
    groups: int = 0
    weights: int = 0
    codes: dict[int, int] = field(default_factory=dict)

    def add(self, other: CodeCount) -> None:
        """Add the totals of other tensors."""
        self.tensors += other.tensors
        self.groups += other.groups
        self.weights += other.weights
        for code, count in other.codes.items():
            self.add_code(code, count)

    def add_code(self, code: int, count: int) -> None:
        """Add weights of one code."""
        self.codes[code] = self.codes.get(code, 0) + count

    def entropy_bits(self) -> float:
        """Return the entropy of the codes in bits per weight."""
        parts = [count / self.weights for count in self.codes.values() if count]
        return -sum(part * math.log2(part) for part in parts)

    def code_bits(self) -> int:
        """Return the bits of a packed code."""
        return (len(self.grid.codes) - 1).bit_length()


@dataclass(frozen=True)
class _Block:
    """Whole groups of a tensor, or rows of a tensor that is one group.

    Attributes:
        start: number of the first group.
        bits: patterns of the values, [N, L].
        magnitudes: the same without signs.
        top: pattern of the largest magnitude, [N, 1].
        second: pattern of the next smaller one, 0 where there is none; [N, 1].
    """

    start: int
    bits: Bits
    magnitudes: Bits
    top: Bits
    second: Bits


def bit_pattern(w: torch.Tensor) -> Bits:
    """Return the bits of a float tensor as unsigned integers, a view of contiguous memory."""
    signed, unsigned = _INTEGERS[w.dtype]
    bits: Bits = w.detach().contiguous().view(signed).numpy().view(unsigned)
    return bits


def count_different_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return how many values of two tensors of one type and shape differ in any bit."""
    return int(np.count_nonzero(bit_pattern(a) != bit_pattern(b)))


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one type and shape are the same; a NaN equals itself."""
    return np.array_equal(bit_pattern(a), bit_pattern(b))


def count_not_finite(w: torch.Tensor) -> int:
    """Return how many values are NaN or infinite."""
    low, high = torch.aminmax(w)  # one pass; both keep NaN
    if bool(low.isfinite() & high.isfinite()):
        return 0
    return int((~w.isfinite()).sum())


def read_codes(
    w_OI: torch.Tensor, weights_per_scale: int, grid: str, eps: float, folded: bool = False
) -> tuple[CodeCount, int | None]:
    """Read the codes of stored values.

    Args:
        w_OI: stored values, [O, I], finite.
        weights_per_scale: inputs of a group, or all weights of the tensor.
        grid: name of the grid.
        eps: smallest scale.
        folded: the values were multiplied with a constant and rounded a second time.
    Returns:
        The totals, and the number of the first group that is not on the grid, None where all are.
        Of a group with one magnitude the values do not tell which level that is. It counts as the
        larger one, which the largest weight takes: but not with the smallest scale, nor in asym4.
    """
    found = find_grid(grid)
    count = CodeCount(found, 1, w_OI.numel() // weights_per_scale, w_OI.numel())
    bad: int | None = None
    for block in _iter_blocks(w_OI, weights_per_scale, _has_two(found)):
        odd_N: npt.NDArray[np.bool_] | None
        if _has_two(found):
            odd_N = _read_two_magnitudes(block, count, w_OI.dtype, eps, folded)
        else:
            odd_N = _read_one_magnitude(block, count)
        if bad is None and odd_N is not None and odd_N.any():
            # All rows of a tensor with one scale belong to group 0.
            whole = weights_per_scale > w_OI.shape[1]
            bad = 0 if whole else block.start + int(odd_N.argmax())
    return count, bad


def describe_group(w_OI: torch.Tensor, weights_per_scale: int, number: int) -> str:
    """Say where a group lies and which values it holds."""
    in_features = w_OI.shape[1]
    if weights_per_scale > in_features:
        where, unit = "the one group", "weights"
    else:
        row, place = divmod(number, in_features // weights_per_scale)
        where, unit = f"row {row}, group {place}", "inputs"
    group: torch.Tensor = w_OI.reshape(-1, weights_per_scale)[number]
    values = sorted(set(group.float().tolist()))
    shown = ", ".join(f"{value:.7g}" for value in values[:8])
    more = f", ... ({len(values)} values)" if len(values) > 8 else ""
    return f"{where} of {weights_per_scale} {unit} holds {shown}{more}"


def count_differences(
    found_OI: torch.Tensor, wanted_OI: torch.Tensor, weights_per_scale: int, grid: str
) -> tuple[int, int]:
    """Count what two tensors on one grid do not share.

    Args:
        found_OI: values on the grid, [O, I].
        wanted_OI: likewise; same type and shape.
        weights_per_scale: inputs of a group, or all weights of the tensor.
        grid: name of the grid.
    Returns:
        (codes, scales): weights with another code, and groups with another scale. A code is a sign
        and, where a group may have two magnitudes, which of them. A group of zeros has no scale to
        compare.
    """
    two = _has_two(find_grid(grid))
    codes = scales = 0
    for a, b in zip(
        _iter_blocks(found_OI, weights_per_scale, two),
        _iter_blocks(wanted_OI, weights_per_scale, two),
        strict=True,
    ):
        codes += int(np.count_nonzero(_ranks(a, two) != _ranks(b, two)))
        other = (a.top != b.top) | ((a.second != b.second) & (a.second != 0) & (b.second != 0))
        scales += int(np.count_nonzero(other & (a.top != 0) & (b.top != 0)))
    return codes, min(scales, found_OI.numel() // weights_per_scale)


def _has_two(grid: Grid) -> bool:
    """Whether a group may hold two magnitudes besides 0."""
    return len({abs(code) for code in grid.codes if code}) > 1


def _iter_blocks(w_OI: torch.Tensor, weights_per_scale: int, two: bool) -> Iterator[_Block]:
    bits = bit_pattern(w_OI)
    mask = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    groups_NL = bits.reshape(-1, min(weights_per_scale, w_OI.shape[1]))
    step = max(1, _BLOCK // groups_NL.shape[1])
    starts = range(0, len(groups_NL), step)
    top_of_all = second_of_all = None
    if weights_per_scale > w_OI.shape[1]:
        parts = [groups_NL[start : start + step] & mask for start in starts]
        top_of_all = max(part.max() for part in parts)
        second_of_all = max(np.where(part < top_of_all, part, 0).max() for part in parts)
    for start in starts:
        block = groups_NL[start : start + step]
        magnitudes = block & mask
        top = magnitudes.max(-1, keepdims=True)
        if top_of_all is not None:
            top = np.full_like(top, top_of_all)
        second = np.zeros_like(top)
        if two and second_of_all is not None:
            second = np.full_like(top, second_of_all)
        elif two:
            second = np.where(magnitudes < top, magnitudes, 0).max(-1, keepdims=True)
        yield _Block(start, block, magnitudes, top, second.astype(top.dtype))


def _ranks(block: _Block, two: bool) -> npt.NDArray[np.int8]:
    """Return 0 for zeros, else 1, or 2 for the larger of two magnitudes, with the sign."""
    ranks = (block.magnitudes != 0).astype(np.int8)
    if two:
        ranks += (block.magnitudes == block.top) & (block.top != 0)
    signed: npt.NDArray[np.int8] = np.where(block.bits != block.magnitudes, -ranks, ranks)
    return signed


def _read_one_magnitude(block: _Block, count: CodeCount) -> npt.NDArray[np.bool_] | None:
    """Add the codes of a ternary block; return which groups hold more than one magnitude."""
    size, nonzero = block.bits.size, int(np.count_nonzero(block.magnitudes))
    plus = int(np.count_nonzero(block.bits.view(f"i{block.bits.itemsize}") > 0))
    for code, number in ((0, size - nonzero), (1, plus), (-1, nonzero - plus)):
        count.add_code(code, number)
    # A group of zeros must not match its own maximum.
    at_top = block.magnitudes == np.maximum(block.top, 1)
    if int(np.count_nonzero(at_top)) == nonzero:
        return None
    odd: npt.NDArray[np.bool_] = ((block.magnitudes != 0) & ~at_top).any(-1)
    return odd


def _read_two_magnitudes(
    block: _Block, count: CodeCount, dtype: torch.dtype, eps: float, folded: bool
) -> npt.NDArray[np.bool_] | None:
    """Add the codes of a block; return which groups are not on the grid."""
    grid = count.grid
    small, large = sorted({abs(code) for code in grid.codes if code})
    single_N1 = block.second == 0
    # A pattern that no magnitude has stands for none: not 0, which zeros would match.
    nothing = np.iinfo(block.bits.dtype).max
    top, second = (np.where(x == 0, nothing, x) for x in (block.top, block.second))
    top, second = top.astype(block.bits.dtype), second.astype(block.bits.dtype)
    at_top, at_second = block.magnitudes == top, block.magnitudes == second
    plus_top, plus_second = block.bits == top, block.bits == second
    zeros = block.bits.size - int(np.count_nonzero(block.magnitudes))
    if large not in grid.codes:  # asym4: only negative weights have the larger level
        is_small_N1 = single_N1
    else:
        smallest = torch.tensor(small * grid.code_unit * eps, dtype=torch.float32).to(dtype)
        is_small_N1 = single_N1 & (block.top == bit_pattern(smallest))
    _add_codes(count, is_small_N1[:, 0], (at_top, plus_top), (at_second, plus_second), zeros)
    odd_N: npt.NDArray[np.bool_] = ~_fit_one_scale(block, grid, dtype, folded)
    # Looked at by group only where the totals say that there is something to find.
    if zeros + int(np.count_nonzero(at_top)) + int(np.count_nonzero(at_second)) != at_top.size:
        odd_N |= ~((block.magnitudes == 0) | at_top | at_second).all(-1)
    if large not in grid.codes and (plus_top & ~single_N1).any():
        odd_N |= (plus_top & ~single_N1).any(-1)
    if zeros and 0 not in grid.codes:
        odd_N |= (block.magnitudes == 0).any(-1)
    return odd_N


def _add_codes(
    count: CodeCount,
    is_small_N: npt.NDArray[np.bool_],
    top: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
    second: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
    zeros: int,
) -> None:
    """Add the codes of a block.

    Args:
        count: where to.
        is_small_N: groups whose largest magnitude is that of the smaller level.
        top: which weights have the largest magnitude, and which of these are positive.
        second: the same of the second largest.
        zeros: how many weights are 0.
    """
    small, large = sorted({abs(code) for code in count.grid.codes if code})
    count.add_code(0, zeros)
    few = is_small_N.any()
    for code, parts in ((large, top), (small, second)):
        total, plus = (int(np.count_nonzero(part)) for part in parts)
        if few and code == large:
            small_total, small_plus = (int(np.count_nonzero(p[is_small_N])) for p in parts)
            count.add_code(small, small_plus)
            count.add_code(-small, small_total - small_plus)
            total, plus = total - small_total, plus - small_plus
        count.add_code(code, plus)
        count.add_code(-code, total - plus)


def _fit_one_scale(
    block: _Block, grid: Grid, dtype: torch.dtype, folded: bool
) -> npt.NDArray[np.bool_]:
    """Whether some float32 scale has both magnitudes of a group as its rounded levels; [N]."""
    keys = block.second[:, 0].astype(np.uint64) << np.uint64(32) | block.top[:, 0]
    unique, of_group = np.unique(keys, return_inverse=True)
    pairs = np.stack([unique >> np.uint64(32), unique & np.uint64(0xFFFFFFFF)], axis=1)
    small, large = sorted({abs(level) for level in grid.levels if level})
    signed, _ = _INTEGERS[dtype]

    def decode(patterns: Any) -> torch.Tensor:
        numbers = torch.from_numpy(patterns.astype(np.int64)).to(signed)
        return numbers.view(dtype).float()

    low = high = second = decode(pairs[:, 0])
    if dtype != torch.float32:  # the float32 numbers that round to the stored one
        low = (decode(np.maximum(pairs[:, 0].astype(np.int64) - 1, 0)) + second) / 2
        high = (decode(pairs[:, 0].astype(np.int64) + 1) + second) / 2
        low = torch.where(low.to(dtype) == second, low, low.nextafter(second))
        high = torch.where(high.to(dtype) == second, high, high.nextafter(second))
    # Both divisions are by powers of two: exact.
    bounds = [(edge / small * large).to(dtype) for edge in (low, high)]
    slack = 2 if folded else 0  # two more roundings, of half a unit each, in both magnitudes
    patterns = [bit_pattern(bound).astype(np.int64) for bound in bounds]
    wanted = pairs[:, 1].astype(np.int64)
    fits = (patterns[0] - slack <= wanted) & (wanted <= patterns[1] + slack)
    fits |= pairs[:, 0] == 0
    result: npt.NDArray[np.bool_] = fits[of_group.reshape(-1)]
    return result
