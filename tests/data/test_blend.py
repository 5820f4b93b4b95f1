"""The order of a blend against Webster's method, seat by seat in exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

from megatron_bitcpm.data import blend as blend_module
from megatron_bitcpm.data.blend import Blend, blend_shares


def webster(weights: list[Fraction], seats: int) -> list[tuple[int, int]]:
    """Give each seat to the party with the largest votes / (2 seats + 1), the first on a tie."""
    won = [0] * len(weights)
    order = []
    for _ in range(seats):
        quotients = [w / (2 * n + 1) for w, n in zip(weights, won, strict=True)]
        winner = quotients.index(max(quotients))
        order.append((winner, won[winner]))
        won[winner] += 1
    return order


WEIGHTS = [
    (1.0,),
    (1.0, 1.0),
    (1.0, 3.0),
    (0.3, 0.7),
    (0.1, 0.2, 0.7),
    (5.0, 3.0, 1.0, 1.0),
    (1.0, 1000.0),
    (0.3333333333333333, 0.6666666666666667),
    tuple(1.0 / (k + 1) for k in range(17)),
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("block", [3, 64, 4096])
def test_order_is_websters(monkeypatch, weights, block):
    monkeypatch.setattr(blend_module, "_BLOCK", block)
    blend = Blend(weights)
    wanted = webster([Fraction(share) for share in blend.shares], 700)
    assert [blend.locate(i) for i in range(700)] == wanted
    for count in (0, 1, 2, 5, 63, 64, 65, 699):
        won = [sum(k == i for k, _ in wanted[:count]) for i in range(len(weights))]
        assert blend.counts(count) == won


def test_order_by_hand():
    blend = Blend([1, 3])  # places 1, 3, 5 ... and 1/3, 1, 5/3, 7/3, 3 ...
    assert [blend.locate(i)[0] for i in range(8)] == [1, 0, 1, 1, 1, 0, 1, 1]
    assert [blend.locate(i)[1] for i in range(8)] == [0, 0, 1, 2, 3, 1, 4, 5]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("total", [10, 1000, 123_457, 10**9, 10**12])
def test_proportions_are_exact_to_rounding(weights, total):
    counts = Blend(weights).counts(total)
    assert sum(counts) == total
    shares = np.array(weights) / sum(weights)
    error = np.abs(np.array(counts) - shares * total)
    # half a sample, and as much as the rounding of all sets together can move this one
    assert (error <= 0.5 + shares * len(weights) / 2).all()
    assert error.max() < (1 if len(weights) < 5 else 1.1)


def test_far_samples_agree_with_the_counts():
    blend = Blend([0.2, 0.5, 0.3])
    start = 7 * 10**9
    counts = blend.counts(start)
    for index in range(start, start + 5000):
        which, number = blend.locate(index)
        assert number == counts[which]
        counts[which] += 1
    assert counts == blend.counts(start + 5000)


def test_shares_do_not_depend_on_the_unit():
    assert blend_shares([0.3, 0.9]) == blend_shares([1, 3]) == blend_shares([30, 90]) == (1, 3)
    assert blend_shares([0.1, 0.2, 0.7]) == (1, 2, 7)
    assert blend_shares([7.5]) == (1,)


def test_weights_of_any_size_can_be_used():
    assert blend_shares([1e-300, 1e300]) == (1, 1 << 53)
    tiny = Blend([1e-30, 1.0])
    assert tiny.counts(10**6) == [0, 10**6]
    digits = Blend([0.12345678901234567, 0.98765432109876543])
    assert digits.counts(10**6) == [111111, 888889]
