"""The reference against a case worked by hand and against sums added one by one."""

import struct

import pytest
import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant import sums, ternary

NAN, INF = float("nan"), float("inf")


def test_hand_worked_case():
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
    codes, scales = ternary.quantize(w, 4)
    eps = struct.unpack("f", struct.pack("f", 1e-5))[0]
    assert codes.tolist() == [
        [1, 0, 0, -1, 1, -1, 0, -1],
        [0, 0, 0, 0, -1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, -1, 1],
        [0, 0, 1, 0, -1, 0, 0, 0],
    ]
    assert scales.nan_to_num(-7.0).tolist() == [[2.0, 1.0], [eps, 2.0], [-7.0, 0.5], [eps, 5.0]]
    wq = ternary.fake_quantize(w, 4)
    assert wq[0].tolist() == [2, 0, 0, -2, 1, -1, 0, -1]
    assert wq[2, :4].isnan().all() and wq[2, 4:].tolist() == [0, 0.5, -0.5, 0.5]
    # All zeros are +0, also those of negative weights.
    assert not wq.signbit()[wq == 0].any()


def test_whole_row_is_the_default_and_equals_its_length():
    w = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ternary.fake_quantize(w), ternary.fake_quantize(w, 96))


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
    got = ternary.scales_from_sums(torch.tensor([6.0, 0.0, INF, NAN]), 3, eps=1e-3)
    third = to_float32(1 / 3)
    assert got[:2].tolist() == [to_float32(6 * third), to_float32(1e-3)]
    assert got[2:].isnan().all()
    with pytest.raises(BitcpmError, match="n=0: a mean needs at least one input"):
        ternary.scales_from_sums(torch.ones(1), 0)


@pytest.mark.parametrize("eps", [0.0, -1.0, NAN, INF, 1e-39])
def test_eps_must_be_a_positive_normal_number(eps):
    with pytest.raises(BitcpmError, match=r"eps=.*: the smallest scale must be a positive normal"):
        ternary.quantize(torch.ones(1, 4), eps=eps)


def test_reciprocal_multiplication_differs_from_the_definition():
    # Why w * (1/s) is not used: one float above s/2 it loses codes that the division keeps.
    scales = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(4)) + 0.01
    w = torch.nextafter(scales / 2, torch.tensor(INF))
    assert (ternary.codes_from_scales(w, scales) == 1).all()
    assert ((w * (1 / scales)).round() != 1).float().mean() > 0.05


def test_bfloat16_and_float16_round_once():
    w = torch.tensor([[1.0, 1.0078125, 1.015625]], dtype=torch.bfloat16)
    # The mean 1.0078125 is a bfloat16; float16 holds the values too.
    assert ternary.fake_quantize(w).float().unique().tolist() == [1.0078125]
    assert ternary.fake_quantize(w.half()).dtype == torch.float16
