"""Codes read back out of values are those that made them; anything off the grid is found."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_bitcpm import ops
from megatron_bitcpm.conversion.codes import (
    count_differences,
    count_not_finite,
    describe_group,
    read_codes,
)
from megatron_bitcpm.quant.grids import find_grid

GRIDS = ("ternary", "asym4", "half_sym4", "int_sym4", "five")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS, INPUTS = 48, 320
EPS = 1e-5


def make(grid, group_size, dtype, spread=0.05, inputs=INPUTS):
    """Values on a grid, and the codes that made them."""
    generator = torch.Generator().manual_seed(1)
    w = (torch.randn(ROWS, inputs, generator=generator) * spread).to(dtype)
    codes, _ = ops.quantize(w, group_size, EPS, grid)
    return ops.fake_quantize(w, group_size, EPS, grid), codes


def as_bits(w):
    return w.view(torch.int32 if w.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_codes_are_those_of_the_quantizer(grid, dtype):
    # 3e-6 is below eps: no weight of a group may reach the larger level there.
    for spread in (0.05, 1e-5, 3e-6):
        wq, codes = make(grid, 64, dtype, spread)
        count, bad = read_codes(wq, 64, find_grid(grid), EPS)
        assert bad is None
        assert (count.tensors, count.groups, count.weights) == (1, ROWS * 5, ROWS * INPUTS)
        wanted = {int(code): int((codes == code).sum()) for code in codes.unique()}
        found = {code: number for code, number in count.codes.items() if number}
        if grid == "asym4":  # a group's only magnitude may be of either level
            found = {-1: found.get(-1, 0) + found.get(-2, 0), 0: found[0], 1: found[1]}
            wanted = {-1: wanted.get(-1, 0) + wanted.get(-2, 0), 0: wanted[0], 1: wanted[1]}
        assert found == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group_size", [8, 64, -1])
def test_one_value_off_the_grid_is_found(group_size, grid, dtype):
    wq, _ = make(grid, group_size, dtype)
    size = INPUTS if group_size == -1 else group_size
    column = int(wq[37].nonzero()[11])
    as_bits(wq)[37, column] += 1
    _, bad = read_codes(wq, size, find_grid(grid), EPS)
    assert bad == (37 * INPUTS + column) // size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != "ternary"])
def test_magnitudes_of_no_common_scale_are_found(grid, dtype):
    """All weights of the larger level one unit off: still two magnitudes, but not of one scale."""
    wq = torch.zeros(4, 64, dtype=dtype)
    levels = {"asym4": (1, -2), "half_sym4": (0.5, 1.5), "int_sym4": (1, 2), "five": (1, 2)}[grid]
    for row in range(4):
        scale = torch.tensor(0.0117 * (row + 1))
        small, large = ((level * scale).to(dtype) for level in levels)
        wq[row, ::2], wq[row, 1::2] = small, large
    assert read_codes(wq, 64, find_grid(grid), EPS)[1] is None
    for step, row in ((1, 2), (-1, 1)):
        moved = wq.clone()
        as_bits(moved)[row, 1::2] += step
        found = read_codes(moved, 64, find_grid(grid), EPS)[1]
        if grid == "half_sym4" and dtype != torch.float32 and found is None:
            # Then a scale that rounds to both must exist: look for it among all of float32.
            half = as_bits((2 * moved[row, 0].float()).view(1)).item()
            scales = torch.arange(half - 2**16, half + 2**16, dtype=torch.int32).view(torch.float32)
            fits = (0.5 * scales).to(dtype) == moved[row, 0]
            assert bool((fits & ((1.5 * scales).to(dtype) == moved[row, 1])).any())
        else:
            assert found == row


def test_zeros_only_where_the_grid_has_them():
    for grid, bad in (("ternary", None), ("five", None), ("half_sym4", 5), ("int_sym4", 5)):
        wq, _ = make(grid, -1, torch.bfloat16)
        wq[5, 3] = 0
        assert read_codes(wq, INPUTS, find_grid(grid), EPS)[1] == bad


def test_the_larger_level_of_asym4_is_negative():
    wq = torch.tensor([[1.0, -2, 0, 1], [1, 2, 0, -1]])
    assert read_codes(wq, 4, find_grid("asym4"), EPS)[1] == 1
    assert read_codes(wq, 4, find_grid("five"), EPS)[1] is None


@pytest.mark.parametrize("grid", GRIDS)
def test_one_scale_for_a_tensor(grid):
    wq, _ = make(grid, -1, torch.bfloat16, inputs=32)
    whole = torch.cat([wq[:1]] * ROWS)
    count, bad = read_codes(whole, whole.numel(), find_grid(grid), EPS)
    assert (bad, count.groups) == (None, 1)
    whole[7, :] *= 1.25
    assert read_codes(whole, whole.numel(), find_grid(grid), EPS)[1] == 0
    assert describe_group(whole, whole.numel(), 0).startswith("the one group of 1536 weights holds")


def test_large_tensors_are_read_in_blocks():
    """More rows than a block has; the group that is found is counted from the first block."""
    wq = torch.zeros(5000, 128, dtype=torch.bfloat16)
    wq[:, 5] = 0.5
    wq[4321, 70] = 0.25
    count, bad = read_codes(wq, 64, find_grid("ternary"), EPS)
    assert bad is None  # one magnitude is on the grid
    wq[4321, 80] = 0.5
    assert read_codes(wq, 64, find_grid("ternary"), EPS)[1] == 4321 * 2 + 1
    assert count.codes[1] == 5001


@pytest.mark.parametrize("grid", GRIDS)
def test_differences_are_counted(grid):
    wq, codes = make(grid, 64, torch.bfloat16)
    assert count_differences(wq, wq.clone(), 64, find_grid(grid)) == (0, 0)
    other = wq.clone()
    other[3, :64] *= 2  # another scale, the same codes
    assert count_differences(other, wq, 64, find_grid(grid)) == (0, 1)
    row, column = (codes[4:] != 0).nonzero()[9].tolist()
    other[4 + row, column] *= -1
    assert count_differences(other, wq, 64, find_grid(grid)) == (1, 1)


def test_differences_between_levels_are_counted():
    wq = torch.tensor([[1.0, 2, -1, 0], [1, 1, 2, 2]])
    other = torch.tensor([[2.0, 2, -1, 0], [1, 1, 2, 2]])
    assert count_differences(other, wq, 4, find_grid("five")) == (1, 0)
    # The smaller magnitude alone: the same codes, another scale.
    other = torch.tensor([[1.25, 2, -1.25, 0], [1, 1, 2, 2]])
    assert count_differences(other, wq, 4, find_grid("five")) == (0, 1)


def test_zeros_have_no_scale():
    wq = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])
    other = torch.tensor([[0.0, 2, 0, 0], [0, 0, 0, 0]])
    assert count_differences(other, wq, 4, find_grid("ternary")) == (2, 0)


def test_entropy():
    count, _ = read_codes(torch.tensor([[1.0, -1, 0, 0]]), 4, find_grid("ternary"), EPS)
    # Two bits a code and a float32 scale for every four.
    assert count.describe() == {
        "zero_fraction": 0.5,
        "entropy_bits_per_weight": pytest.approx(1.5),
        "packed_bits_per_weight": 2 + 32 / 4,
    }
    assert count.packed_bytes() == 1 + 4
    wq, _ = make("five", -1, torch.float32)
    five, _ = read_codes(wq, INPUTS, find_grid("five"), EPS)
    assert five.describe()["packed_bits_per_weight"] == 3 + 32 / INPUTS


def test_not_finite():
    w = torch.ones(4, 4, dtype=torch.bfloat16)
    assert count_not_finite(w) == 0
    w[0, 0], w[1, 1], w[2, 2] = math.nan, math.inf, -math.inf
    assert count_not_finite(w) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite(value, dtype):
    for place in (0, 7, 99):
        w = torch.full((10, 10), -3e4, dtype=dtype)
        assert count_not_finite(w) == 0
        w.view(-1)[place] = value
        assert count_not_finite(w) == 1
    assert count_not_finite(torch.empty(0, dtype=dtype)) == 0
