"""The reference against a case worked by hand and against sums added one by one."""

import struct
import subprocess
import sys

import pytest
import torch
import torch._dynamo

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant import fake_quant, grids, packing, scales, sums

NAN, INF = float("nan"), float("inf")


def test_ternary_worked_by_hand():
    # Groups of 4: row 0 sums 8 and 4, so s = 2 and 1; row 1 has a zero group and a tie at s/2;
    # row 2 has a NaN group; row 3 lies below eps, then a group with one large value.
    w = torch.tensor(
        [
            [3.0, -1.0, 1.0, -3.0, 1.0, -1.0, 0.5, -1.5],
            [0.0, -0.0, 0.0, 0.0, -2.0, 2.0, 4.0, 0.0],
            [1.0, NAN, 0.0, -1.0, 0.25, 0.75, -0.5, 0.5],
            [1e-6, -1e-6, 9e-6, 0.0, -16.0, 1.0, 1.0, 2.0],
        ]
    )
    codes, scales_OG = fake_quant.quantize(w, 4)
    eps = struct.unpack("f", struct.pack("f", 1e-5))[0]
    assert codes.tolist() == [
        [1, 0, 0, -1, 1, -1, 0, -1],
        [0, 0, 0, 0, -1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, -1, 1],
        [0, 0, 1, 0, -1, 0, 0, 0],
    ]
    assert scales_OG.nan_to_num(-7.0).tolist() == [[2.0, 1.0], [eps, 2.0], [-7.0, 0.5], [eps, 5.0]]
    wq = fake_quant.fake_quantize(w, 4)
    assert wq[0].tolist() == [2, 0, 0, -2, 1, -1, 0, -1]
    assert wq[2, :4].isnan().all() and wq[2, 4:].tolist() == [0, 0.5, -0.5, 0.5]
    # All zeros are +0, also those of negative weights.
    assert not wq.signbit()[wq == 0].any()


# Groups of 4. Row 0: maxima 3 and 6, then a tie of every kind; row 1: a zero group, a tie on the
# negative side; row 2: a group with NaN and one below eps; row 3: one with an infinity, all equal.
BY_MAXIMUM = [
    [3.0, -1.0, 1.0, -3.0, 6.0, -6.0, 2.0, -5.0],
    [0.0, -0.0, 0.0, 0.0, 0.75, -0.25, -0.75, -0.5],
    [1.0, NAN, 0.0, -1.0, 1e-6, -1e-6, 9e-6, 0.0],
    [INF, 0.5, 0.0, -1.0, -2.0, -2.0, -2.0, -2.0],
]
# For each grid: codes, then scales (None for eps, NAN for not usable), then the level of code 1.
BY_HAND = {
    # Maximum / 1.5: scales 2 and 4; eps and 0.5; NaN and eps; NaN and fl(2 / 1.5). -3 = -1.5 * 2
    # is a tie and becomes -1, and so do all most negative maxima whose scale is exact.
    "asym4": (
        [
            [1, 0, 0, -1, 1, -1, 0, -1],
            [0, 0, 0, 0, 1, 0, -1, -1],
            [0, 0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, -1, -1, -1, -1],
        ],
        [[2.0, 4.0], [None, 0.5], [NAN, None], [NAN, 1.3333333730697632]],
        1.0,
    ),
    # The same scales; the midpoint is 1: |w| = s keeps 0.5, zeros of both signs are +0.5.
    "half_sym4": (
        [
            [3, -1, 1, -3, 3, -3, 1, -3],
            [1, 1, 1, 1, 3, -1, -3, -1],
            [0, 0, 0, 0, 1, -1, 1, 1],
            [0, 0, 0, 0, -3, -3, -3, -3],
        ],
        [[2.0, 4.0], [None, 0.5], [NAN, None], [NAN, 1.3333333730697632]],
        0.5,
    ),
    # Maximum / 2: scales 1.5 and 3; eps and 0.375; NaN and eps; NaN and 1. Midpoint 1.5.
    "int_sym4": (
        [
            [2, -1, 1, -2, 2, -2, 1, -2],
            [1, 1, 1, 1, 2, -1, -2, -1],
            [0, 0, 0, 0, 1, -1, 1, 1],
            [0, 0, 0, 0, -2, -2, -2, -2],
        ],
        [[1.5, 3.0], [None, 0.375], [NAN, None], [NAN, 1.0]],
        1.0,
    ),
    # The same scales, midpoints 0.5 and 1.5: -0.25 lies above 0.5 * 0.375, 9e-6 above eps / 2.
    "five": (
        [
            [2, -1, 1, -2, 2, -2, 1, -2],
            [0, 0, 0, 0, 2, -1, -2, -1],
            [0, 0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, -2, -2, -2, -2],
        ],
        [[1.5, 3.0], [None, 0.375], [NAN, None], [NAN, 1.0]],
        1.0,
    ),
}


@pytest.mark.parametrize("grid", BY_HAND)
def test_grids_by_maximum_worked_by_hand(grid):
    codes_want, scales_want, unit = BY_HAND[grid]
    eps = to_float32(1e-5)
    scales_want = torch.tensor([[eps if s is None else s for s in row] for row in scales_want])
    w = torch.tensor(BY_MAXIMUM)
    codes, scales_OG = fake_quant.quantize(w, 4, grid=grid)
    assert codes.tolist() == codes_want
    assert torch.equal(scales_OG.nan_to_num(-7.0), scales_want.nan_to_num(-7.0))
    wq = fake_quant.fake_quantize(w, 4, grid=grid)
    want = torch.tensor(codes_want) * unit * scales_want.repeat_interleave(4, 1)
    assert torch.equal(wq.nan_to_num(-7.0), want.nan_to_num(-7.0))
    assert not wq.signbit()[wq == 0].any()


def test_the_table_of_grids():
    table = {
        "ternary": ([-1, 0, 1], [-1, 0, 1], "abs_sum"),
        "asym4": ([-2, -1, 0, 1], [-2, -1, 0, 1], "abs_max"),
        "half_sym4": ([-1.5, -0.5, 0.5, 1.5], [-3, -1, 1, 3], "abs_max"),
        "int_sym4": ([-2, -1, 1, 2], [-2, -1, 1, 2], "abs_max"),
        "five": ([-2, -1, 0, 1, 2], [-2, -1, 0, 1, 2], "abs_max"),
    }
    assert list(grids.GRIDS) == list(table)
    for name, (levels, codes, statistic) in table.items():
        grid = grids.find_grid(name)
        assert [list(grid.levels), list(grid.codes)] == [levels, codes]
        assert grid.statistic == statistic


def test_scales_from_max():
    maxima = torch.tensor([3.0, 1.0, 0.0, INF, NAN])
    got = scales.scales_from_max(maxima, 1e-3, "asym4")
    assert got[:3].tolist() == [2.0, to_float32(1 / 1.5), to_float32(1e-3)]
    assert got[3:].isnan().all()
    assert scales.scales_from_max(maxima, 1e-3, "five")[:2].tolist() == [1.5, 0.5]
    # A division: multiplying with fl(1 / 1.5) gives another float for one maximum in four or so.
    many = torch.linspace(0.1, 1, 10_000)
    want = torch.tensor([to_float32(value / 1.5) for value in many.tolist()])
    assert torch.equal(scales.scales_from_max(many, grid="half_sym4"), want)
    assert (many * to_float32(1 / 1.5) != want).float().mean() > 0.05
    for grid, fix in (("ternary", "Use scales_from_sums."), ("six", "Use ternary, asym4")):
        with pytest.raises(BitcpmError, match=rf"grid={grid}: .*{fix}"):
            scales.scales_from_max(maxima, grid=grid)


def test_largest_values_of_groups():
    w = torch.tensor([[1.0, -2.0, 0.0, NAN], [-0.0, 0.0, -INF, 3.0]]).bfloat16()
    got = scales.abs_maxima(w, 2)
    assert got.dtype == torch.float32 and got[0, 1].isnan()
    assert [got[0, 0], *got[1]] == [2.0, 0.0, INF]
    assert scales.abs_maxima(w[:, :2]).tolist() == [[2.0], [0.0]]


def test_packing_worked_by_hand():
    # 129 inputs: the first of each quarter of a block, the last of the first quarter, one more.
    codes = torch.full((1, 129), -1, dtype=torch.int8)
    codes[0, [0, 32, 64, 96]] = torch.tensor([1, 0, 1, 0], dtype=torch.int8)
    codes[0, 31], codes[0, 127], codes[0, 128] = 1, 1, 1
    packed = packing.pack2(codes)[0].tolist()
    assert packed[0] == 0b01_10_01_10
    assert packed[31] == 0b10_00_00_10
    assert packed[1:31] == [0] * 30
    # The second block holds one code; what follows is code 0, field 1.
    assert packed[32] == 0b01_01_01_10
    assert packed[33:] == [0b01010101] * 31


def test_whole_row_is_the_default_and_equals_its_length():
    w = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fake_quant.fake_quantize(w), fake_quant.fake_quantize(w, 96))


def sum_in_order(values: list[float]) -> float:
    """The canonical sum one addition at a time; struct rounds each to float32."""
    lanes = [0.0] * 64
    for index, value in enumerate(values):
        lanes[index % 64] = to_float32(lanes[index % 64] + abs(value))
    while len(lanes) > 1:
        lanes = [to_float32(lanes[i] + lanes[i + 1]) for i in range(0, len(lanes), 2)]
    return lanes[0]


def to_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 130, 1000, 4096])
def test_sum_order(length):
    w = torch.randn(4, length, generator=torch.Generator().manual_seed(length))
    w *= torch.logspace(-4, 4, length)
    want = [[sum_in_order(row)] for row in w.tolist()]
    assert sums.sum_abs_canonical(w, length).tolist() == want


def test_the_sum_order_is_visible():
    # The guard of test_sum_order: other orders give other bits on the same rows.
    w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).abs()
    ours = sums.sum_abs_canonical(w, 4096)
    assert not torch.equal(ours, w.sum(1, keepdim=True))
    assert not torch.equal(ours, w.cumsum(1)[:, -1:])


def test_scales_from_sums():
    got = scales.scales_from_sums(torch.tensor([6.0, 0.0, INF, NAN]), 3, eps=1e-3)
    third = to_float32(1 / 3)
    assert got[:2].tolist() == [to_float32(6 * third), to_float32(1e-3)]
    assert got[2:].isnan().all()
    # More inputs than float32 counts: 1 / n is rounded once.
    many = 2**24 + 1
    got = scales.scales_from_sums(torch.tensor([1.0, 3.0]), many, eps=2.0**-126)
    assert got.tolist() == [to_float32(to_float32(1 / many) * x) for x in (1.0, 3.0)]
    for sums_G, n, message in (
        (torch.ones(1), 0, "n=0: a mean needs at least one input"),
        (torch.ones(1), 2.5, "n=2.5: must be a whole number"),
        (torch.ones(1), True, "n=True: must be a whole number"),
        (torch.ones(1).bfloat16(), 2, "sums.dtype=torch.bfloat16: must be float32. Take them from"),
    ):
        with pytest.raises(BitcpmError, match=message):
            scales.scales_from_sums(sums_G, n)


COMPILE = """
import torch
from megatron_bitcpm.quant import scales
sums_OG = torch.tensor([[6.0, 0.0], [float("inf"), float("nan")], [1 / 3, 5.0]])
compiled = torch.compile(scales.scales_from_sums, fullgraph=True, backend="aot_eager")
for n in (3, 7, 96):
    want = scales.scales_from_sums(sums_OG, n, 1e-3)
    assert torch.equal(compiled(sums_OG, n, 1e-3).nan_to_num(-7.0), want.nan_to_num(-7.0))
"""


@pytest.mark.slow
def test_scales_from_sums_compiles_as_one_graph():
    # In a process of its own: the platform of the CPU disables compilation.
    subprocess.run([sys.executable, "-c", COMPILE], check=True)


@pytest.mark.parametrize("eps", [0.0, -1.0, NAN, INF, 1e-39])
def test_eps_must_be_a_positive_normal_number(eps):
    with pytest.raises(BitcpmError, match=r"eps=.*: the smallest scale must be a positive normal"):
        fake_quant.quantize(torch.ones(1, 4), eps=eps)


def test_reciprocal_multiplication_differs_from_the_definition():
    # Why w * (1/s) is not used: one float above s/2 it loses codes that the division keeps.
    scales_OG = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(4)) + 0.01
    w = torch.nextafter(scales_OG / 2, torch.tensor(INF))
    assert (fake_quant.codes_from_scales(w, scales_OG) == 1).all()
    assert ((w * (1 / scales_OG)).round() != 1).float().mean() > 0.05


def test_bfloat16_and_float16_round_once():
    w = torch.tensor([[1.0, 1.0078125, 1.015625]], dtype=torch.bfloat16)
    # The mean 1.0078125 is a bfloat16; float16 holds the values too.
    assert fake_quant.fake_quantize(w).float().unique().tolist() == [1.0078125]
    assert fake_quant.fake_quantize(w.half()).dtype == torch.float16
