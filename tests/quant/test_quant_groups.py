"""Group arithmetic for full and for sharded rows."""

import pytest
import torch

from megatron_bitcpm import ops
from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant import groups
from megatron_bitcpm.quantizer import Quantizer


def test_nearest_divisors():
    assert groups.find_nearest_divisors(4544, 128) == [71, 142]
    assert groups.find_nearest_divisors(12, 5) == [4, 6]
    assert groups.find_nearest_divisors(12, 6) == [4, 6]
    assert groups.find_nearest_divisors(12, 100) == [12]
    assert groups.find_nearest_divisors(7, 1) == [1]
    assert groups.find_nearest_divisors(0, 4) == []


def test_resolve_and_count():
    assert groups.resolve_group_size(256, -1) == 256
    assert groups.resolve_group_size(256, 64) == 64
    assert (groups.count_groups(256, 64), groups.count_groups(256, -1)) == (4, 1)
    assert groups.count_groups(0, -1) == 0
    with pytest.raises(BitcpmError, match=r"^group_size=-2: must be at least 1, or -1"):
        groups.resolve_group_size(256, -2)
    message = r"^group_size=96: in_features 256 is not a multiple. Use 64 or 128, or -1 for the"
    with pytest.raises(BitcpmError, match=message):
        groups.resolve_group_size(256, 96)


@pytest.mark.parametrize(
    ("args", "want"),
    [
        ((1024, 4, 64, "column"), (64, 64, False)),
        ((1024, 4, -1, "column"), (-1, 1024, False)),
        ((1024, 4, 64, "row"), (64, 64, False)),
        ((1024, 4, -1, "row"), (-1, 1024, True)),
        ((1024, 4, -1, "row", "local"), (-1, 256, False)),
        ((1024, 1, -1, "row"), (-1, 1024, False)),
        ((1024, 4, 512, "column"), (512, 512, False)),
    ],
)
def test_sharded_groups(args, want):
    got = groups.resolve_sharded_groups(*args)
    assert (got.local_group_size, got.scale_len, got.needs_sum_exchange) == want


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (18176, 4, 128, "row"),
            "quant.group_size=128: local in_features 4544 (18176 / tp 4) is not a multiple. "
            "Use 71 or 142, or tp 2.",
        ),
        (
            (1000, 3, -1, "row"),
            "tp=3: in_features 1000 of a row-parallel linear is not a multiple. Use tp 2 or 4.",
        ),
        (
            (1024, 4, 96, "row"),
            "quant.group_size=96: in_features 1024 is not a multiple. "
            "Use 64 or 128, or -1 for the whole row.",
        ),
    ],
)
def test_sharded_groups_that_do_not_fit(args, message):
    with pytest.raises(BitcpmError) as caught:
        groups.resolve_sharded_groups(*args)
    assert str(caught.value) == message


def test_rank_order_matters_and_is_left_to_right():
    parts = [torch.tensor([x]) for x in (1e8, 4.0, 4.0, -1e8)]
    # float32: 1e8 + 4 rounds to 1e8, twice; from the right the two fours would survive.
    assert groups.add_in_rank_order(parts).item() == 0.0
    assert parts[0].item() == 1e8
    with pytest.raises(BitcpmError, match=r"sums_per_rank=\[\]: needs one tensor per rank"):
        groups.add_in_rank_order([])


def test_row_statistics_of_ranks_are_joined_in_rank_order():
    # From the other end the ones would survive: 16777220.
    parts = [torch.tensor([x]) for x in (2.0**24, 1.0, 1.0, 1.0)]
    ternary = Quantizer(QuantConfig())
    assert ternary.combine(parts).tolist() == [16777216.0]
    assert ternary.combine(parts[::-1]).tolist() == [16777220.0]
    # Of other grids the scales are joined, and a NaN stays one wherever it is.
    others = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, float("nan")]), torch.tensor([2.0, 4.0])]
    joined = Quantizer(QuantConfig(grid="five")).combine(others)
    assert joined[0] == 3.0 and joined[1].isnan()


def test_sliced_sums_are_the_shards_sums():
    w = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    down = find_projection("model.layers.0.mlp.down_proj.weight").spec
    halves = [ops.abs_sums(half) for half in (w[:, :512], w[:, 512:])]
    _, scales = Quantizer(QuantConfig(), 2).codes_scales(w, down)
    assert torch.equal(scales, ops.scales_from_sums(halves[0] + halves[1], 1024))
    message = r"^tp=3: in_features 1024 of a row-parallel linear is not a multiple. Use tp 2 or 4."
    for group_size in (-1, "tensor"):
        with pytest.raises(BitcpmError, match=message):
            Quantizer(QuantConfig(group_size=group_size), 3).codes_scales(w, down)
