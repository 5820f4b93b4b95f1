"""The table itself, on hand-made weights: which row goes where, and which sums make a scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_factory import tiny_model

from megatron_bitcpm import ops
from megatron_bitcpm.arch.model import shapes_of
from megatron_bitcpm.arch.tensors import LLAMA, find_projection
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.megatron.torch_dist_reader import TorchDistTensors
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quantizer import Quantizer

PROJECTIONS = {spec.module: spec for spec in LLAMA if spec.role == "projection"}


@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (6, 6), (6, 1), (8, 2)])
def test_qkv_rows(heads, groups):
    model = tiny_model("flat", num_attention_heads=heads, num_query_groups=groups)
    per_group = heads // groups
    rows = groups * (per_group + 2) * 4
    fused = torch.arange(rows * 8).view(rows, 8)
    qkv = PROJECTIONS["self_attention.linear_qkv"]
    assert [part.names["hf"] for part in qkv.parts] == [
        f"self_attn.{letter}_proj.weight" for letter in "qkv"
    ]
    q, k, v = qkv.split(fused, model.dimensions())
    assert q.shape == (heads * 4, 8)
    assert k.shape == v.shape == (groups * 4, 8)
    for head in range(heads):
        start = (head // per_group * (per_group + 2) + head % per_group) * 4
        assert torch.equal(q[head * 4 : head * 4 + 4], fused[start : start + 4])
    for group in range(groups):
        start = (group * (per_group + 2) + per_group) * 4
        assert torch.equal(k[group * 4 : group * 4 + 4], fused[start : start + 4])
        assert torch.equal(v[group * 4 : group * 4 + 4], fused[start + 4 : start + 8])


@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (6, 6), (8, 2)])
def test_counted_rows_are_those_of_the_split(heads, groups):
    changes = {"num_attention_heads": heads, "num_query_groups": groups, "ffn_hidden_size": 10}
    dims = tiny_model("flat", **changes).dimensions()
    for spec in PROJECTIONS.values():
        parts = spec.split(torch.zeros(spec.shape(dims)), dims)
        for number, part in enumerate(parts):
            assert spec.part_shape(number, dims) == tuple(part.shape)


def test_counting_rows_needs_no_memory():
    large = tiny_model("flat", ffn_hidden_size=2**60, num_layers=1)
    assert shapes_of(large, 9)["model.layers.0.mlp.up_proj.weight"] == (2**60, 8)


def test_more_layers_than_can_be_named():
    tensors = object.__new__(TorchDistTensors)
    tensors.folder = Path("checkpoint")
    with pytest.raises(CheckpointError, match=r"num_layers=1000000000: no model has more than"):
        tensors.check(tiny_model("flat", num_layers=10**9))


def test_gate_is_the_first_half():
    fused = torch.arange(16 * 8).view(16, 8)
    fc1 = PROJECTIONS["mlp.linear_fc1"]
    gate, up = fc1.split(fused, tiny_model("flat").dimensions())
    assert [part.names["hf"] for part in fc1.parts] == [
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    ]
    assert torch.equal(gate, fused[:8])
    assert torch.equal(up, fused[8:])


def canonical_sum(values: np.ndarray) -> np.float32:
    lanes = np.zeros(64, np.float32)
    for i, value in enumerate(np.abs(values)):
        lanes[i % 64] += value
    while len(lanes) > 1:
        lanes = lanes[0::2] + lanes[1::2]
    return lanes[0]


def quantize(w, name, tp_size, **quant):
    """Quantise a weight of training as its projection `name` is exported."""
    place = find_projection(f"model.layers.0.{name}.weight")
    assert place is not None
    return Quantizer(QuantConfig(**quant), tp_size).values(w, place.spec)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_sharded_rows_use_the_slices_of_training(tp_size):
    w = torch.randn(96, 512)
    wq = quantize(w, "mlp.down_proj", tp_size)
    for row, wq_row in zip(w.numpy(), wq.numpy(), strict=True):
        total = np.float32(0)
        for part in np.split(row, tp_size):
            total = np.float32(total + canonical_sum(part))
        scale = np.float32(total * np.float32(1 / 512))
        assert np.array_equal(wq_row, np.clip(np.rint(row / scale), -1, 1) * scale)
    # The difference is visible: one sum over the whole row gives other scales.
    assert not torch.equal(wq, ops.fake_quantize(w, -1, 1e-5))


def test_local_scales_are_groups():
    w = torch.randn(16, 512)
    parts = [ops.fake_quantize(part, -1, 1e-5) for part in w.chunk(4, dim=1)]
    found = quantize(w, "self_attn.o_proj", 4, scale_sync="local")
    assert torch.equal(found, torch.cat(parts, 1))


# In float32 a 1 that is added to 2**24 is lost, so that a sum tells its order. Lanes are 64 wide.
LOST = 2.0**24


def scales_by_tp_size(name: str, w: torch.Tensor) -> dict[int, float]:
    """Export a weight of training with one scale per projection: its scale by tp size."""
    return {tp: quantize(w, name, tp, group_size="tensor").max().item() for tp in (1, 2, 4)}


def test_one_scale_of_sharded_rows_adds_the_slices_of_training():
    w = torch.zeros(4, 512)
    w[:, 0] = LOST
    w[:, 128::128] = 1.0  # in the lane of the large weight, as long as they are in its slice
    # Of a row: one slice loses all three, two keep 1 + 1 of the second, four add them one by one.
    assert scales_by_tp_size("mlp.down_proj", w) == {
        1: 4 * LOST / 2048,
        2: 4 * (LOST + 2) / 2048,
        4: 4 * LOST / 2048,
    }


def test_one_scale_of_whole_rows_does_not_depend_on_the_layout():
    w = torch.ones(4, 512)
    w[:, 0] = LOST
    whole = scales_by_tp_size("mlp.gate_proj", w)
    assert whole[1] == whole[2] == whole[4]
    # Had these rows been cut, each layout would have another sum.
    assert len({*scales_by_tp_size("mlp.down_proj", w).values()}) == 3


def test_filters():
    quant = QuantConfig(full_precision_last_layers=1, exclude=("*.0.mlp.*",))
    names = Quantizer(quant).tensors(shapes_of(tiny_model("flat"), 300), 4)
    assert len(names) == 4 + 7 + 7
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.0.mlp.up_proj.weight" not in names
    assert names["model.layers.1.self_attn.o_proj.weight"] == 24
    assert quant.excludes("decoder.layers.3.mlp.linear_fc1", 3, 4)
    assert not quant.excludes("decoder.layers.2.mlp.linear_fc1", 2, 4)
