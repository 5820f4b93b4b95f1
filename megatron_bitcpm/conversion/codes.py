"""Codes and scales read back out of stored values, and whether these are on a grid at all.

A value on a grid is level * scale, rounded to the type it is stored in. Nothing tells the scale but
the values themselves, so a group is read by its magnitudes: in every grid it holds at most two
besides 0, and two must be roundings of one scale's levels. A group of zeros has no scale.

Of a group with one magnitude the values do not tell which level that is. It counts as the larger
one, which the largest weight takes: but not with the smallest scale, nor in asym4, where only
negative weights have the larger level.

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

from megatron_bitcpm.quant.grids import Grid

SCALE_BITS = 32
"""Bits of a packed scale (float32)."""
_INTEGERS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
    torch.float32: (torch.int32, np.uint32),
}
"""Integers of the size of a type, of torch and of NumPy."""
_BLOCK = 1 << 18
"""Values of a block: half a megabyte of bfloat16."""

Bits = npt.NDArray[np.unsignedinteger[Any]]
Codes = npt.NDArray[np.int8]
Flags = npt.NDArray[np.bool_]


@dataclass
class CodeCount:
    """Totals over tensors on a grid; `codes` counts the weights by their stored code."""

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
            self.codes[code] = self.codes.get(code, 0) + count

    def add_codes(self, codes: Codes) -> None:
        """Count the codes of some weights of a tensor that is counted already."""
        for code in {0, *self.grid.codes}:
            count = int(np.count_nonzero(codes == code))
            self.codes[code] = self.codes.get(code, 0) + count

    def packed_bytes(self) -> float:
        """Return the bytes of packed codes and float32 scales."""
        return (self.grid.code_bits * self.weights + SCALE_BITS * self.groups) / 8

    def describe(self) -> dict[str, float]:
        """Return zero_fraction, entropy_bits_per_weight (of codes), packed_bits_per_weight."""
        parts = [count / self.weights for count in self.codes.values() if count]
        return {
            "zero_fraction": self.codes.get(0, 0) / self.weights,
            "entropy_bits_per_weight": -sum(part * math.log2(part) for part in parts),
            "packed_bits_per_weight": self.grid.code_bits + SCALE_BITS * self.groups / self.weights,
        }


@dataclass(frozen=True)
class _Block:
    """Whole groups of a tensor, or rows of a tensor that is one group; as bit patterns.

    `start` is the number of the first group. `second`, the magnitude below the largest one, `top`,
    is 0 where there is none. `bits` and `magnitudes` (no signs) are [N, L], the others [N, 1].
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


def count_not_finite(w: torch.Tensor) -> int:
    """Return how many values are NaN or infinite."""
    if not w.numel():
        return 0
    low, high = torch.aminmax(w)  # one pass; both keep NaN
    if bool(low.isfinite() & high.isfinite()):
        return 0
    return int((~w.isfinite()).sum())


def read_codes(
    w_OI: torch.Tensor, weights_per_scale: int, grid: Grid, eps: float, folded: bool = False
) -> tuple[CodeCount, int | None]:
    """Read the codes of stored values, [O, I], finite; a group is a part of a row, or the tensor.

    `folded` values were multiplied with a constant and rounded a second time. Returns the totals,
    and the number of the first group that is not on the grid, None where all are.
    """
    count = CodeCount(grid, 1, w_OI.numel() // weights_per_scale, w_OI.numel())
    bad: int | None = None
    for block in _iter_blocks(w_OI, weights_per_scale, grid):
        codes_NL, odd_N = _read_block(block, grid, w_OI.dtype, eps, folded)
        count.add_codes(codes_NL)
        if bad is None and odd_N is not None and odd_N.any():
            # All rows of a tensor with one scale belong to group 0.
            whole = weights_per_scale > w_OI.shape[1]
            bad = 0 if whole else block.start + int(odd_N.argmax())
    return count, bad


def read_scales(
    w_OI: torch.Tensor, weights_per_scale: int, grid: Grid, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, int8 [O, I], and scales, float32 [O, G], of stored values on a grid.

    A scale follows from the smaller magnitude that a group holds, as it was rounded; 0 of a group
    of zeros.
    """
    codes, scales = [], []
    for block in _iter_blocks(w_OI, weights_per_scale, grid):
        codes_NL, _ = _read_block(block, grid, w_OI.dtype, eps, False)
        codes.append(codes_NL)
        smaller = np.where(block.second != 0, block.second, block.top)
        held = np.abs(np.where(block.magnitudes == smaller, codes_NL, 0)).max(-1, keepdims=True)
        levels = np.maximum(held, 1) * grid.code_unit
        scales.append(_decode(smaller, w_OI.dtype) / torch.from_numpy(levels).float())
    codes_OI = torch.from_numpy(np.concatenate(codes)).reshape(w_OI.shape)
    return codes_OI, torch.cat(scales).reshape(w_OI.shape[0], -1)


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
    found_OI: torch.Tensor, wanted_OI: torch.Tensor, weights_per_scale: int, grid: Grid
) -> tuple[int, int]:
    """Count the codes (weights) and scales (groups) that two tensors on one grid do not share.

    Both are [O, I] of one type. A code is a sign and, where a group may have two magnitudes, which
    of them. A group of zeros has no scale to compare.
    """
    codes = scales = 0
    for a, b in zip(
        _iter_blocks(found_OI, weights_per_scale, grid),
        _iter_blocks(wanted_OI, weights_per_scale, grid),
        strict=True,
    ):
        codes += int(np.count_nonzero(_ranks(a, grid) != _ranks(b, grid)))
        other = (a.top != b.top) | ((a.second != b.second) & (a.second != 0) & (b.second != 0))
        scales += int(np.count_nonzero(other & (a.top != 0) & (b.top != 0)))
    return codes, min(scales, found_OI.numel() // weights_per_scale)


def _iter_blocks(w_OI: torch.Tensor, weights_per_scale: int, grid: Grid) -> Iterator[_Block]:
    bits, two = bit_pattern(w_OI), len(grid.magnitudes) > 1
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


def _ranks(block: _Block, grid: Grid) -> Codes:
    """Return 0 for zeros, else 1, or 2 for the larger of two magnitudes, with the sign."""
    ranks = (block.magnitudes != 0).astype(np.int8)
    if len(grid.magnitudes) > 1:
        ranks += (block.magnitudes == block.top) & (block.top != 0)
    signed: Codes = np.where(block.bits != block.magnitudes, -ranks, ranks)
    return signed


def _read_block(
    block: _Block, grid: Grid, dtype: torch.dtype, eps: float, folded: bool
) -> tuple[Codes, Flags | None]:
    """Return the codes of a block, [N, L], and which groups are not on the grid, [N] or None."""
    ranks, magnitudes = _ranks(block, grid), block.magnitudes
    if len(grid.magnitudes) == 1:
        # A group of zeros must not match its own maximum.
        at_top = magnitudes == np.maximum(block.top, 1)
        if np.count_nonzero(at_top) == np.count_nonzero(magnitudes):
            return ranks, None
        return ranks, ((magnitudes != 0) & ~at_top).any(-1)
    small, large = grid.magnitudes
    # A negative rank counts from the end.
    codes = np.array([0, small, large, -large, -small], np.int8)[ranks]
    single_N1 = block.second == 0
    is_small_N1 = single_N1
    if large in grid.codes:
        smallest = torch.tensor(small * grid.code_unit * eps, dtype=torch.float32).to(dtype)
        is_small_N1 = single_N1 & (block.top == bit_pattern(smallest))
    if is_small_N1.any():
        codes = np.where(is_small_N1, np.sign(ranks) * np.int8(small), codes)
    odd_N: Flags = ~_fit_one_scale(block, grid, dtype, folded)
    odd_N |= ~((magnitudes == 0) | (magnitudes == block.top) | (magnitudes == block.second)).all(-1)
    if large not in grid.codes:
        odd_N |= ((codes == large) & ~single_N1).any(-1)
    if 0 not in grid.codes:
        odd_N |= (magnitudes == 0).any(-1)
    return codes, odd_N


def _decode(patterns: Any, dtype: torch.dtype) -> torch.Tensor:
    signed, _ = _INTEGERS[dtype]
    return torch.from_numpy(patterns.astype(np.int64)).to(signed).view(dtype).float()


def _fit_one_scale(block: _Block, grid: Grid, dtype: torch.dtype, folded: bool) -> Flags:
    """Whether some float32 scale has both magnitudes of a group as its rounded levels; [N]."""
    keys = block.second[:, 0].astype(np.uint64) << np.uint64(32) | block.top[:, 0]
    unique, of_group = np.unique(keys, return_inverse=True)
    pairs = np.stack([unique >> np.uint64(32), unique & np.uint64(0xFFFFFFFF)], axis=1)
    small, large = grid.magnitudes
    seconds = pairs[:, 0].astype(np.int64)
    low = high = second = _decode(seconds, dtype)
    if dtype != torch.float32:  # the float32 numbers that round to the stored one
        low = (_decode(np.maximum(seconds - 1, 0), dtype) + second) / 2
        high = (_decode(seconds + 1, dtype) + second) / 2
        low = torch.where(low.to(dtype) == second, low, low.nextafter(second))
        high = torch.where(high.to(dtype) == second, high, high.nextafter(second))
    bounds = [(edge / small * large).to(dtype) for edge in (low, high)]
    slack = 2 if folded else 0  # two more roundings, of half a unit each, in both magnitudes
    patterns = [bit_pattern(bound).astype(np.int64) for bound in bounds]
    wanted = pairs[:, 1].astype(np.int64)
    fits = (patterns[0] - slack <= wanted) & (wanted <= patterns[1] + slack)
    fits |= seconds == 0
    result: Flags = fits[of_group.reshape(-1)]
    return result
