"""`Quantizer`: codes and scales are what the values are made of, in every way it can be set."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from helpers.model_factory import MemorySource, tensor_shapes, tiny_model

from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.quant.grids import GRIDS
from megatron_bitcpm.quantizer import BF16_RECIPROCAL, FP32, Quantizer

KINDS = [(grid, FP32) for grid in GRIDS] + [("ternary", BF16_RECIPROCAL)]
GROUP_SIZES = (16, -1, "tensor")
ROWS, INPUTS = 24, 96
COLUMN = find_projection("model.layers.0.mlp.up_proj.weight").spec
ROW = find_projection("model.layers.0.mlp.down_proj.weight").spec
MODEL = tiny_model("grid", ffn_hidden_size=96)


def random_weight(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian weights; in the first row they are smaller than eps, so that eps is the scale."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[0] *= 1e-4
    return w.to(dtype)


def make_quantizer(grid, numerics, tp_size=1, **quant) -> Quantizer:
    return Quantizer(QuantConfig(grid=grid, **quant), tp_size, numerics)


def expand(scales_OG: torch.Tensor, inputs: int) -> torch.Tensor:
    return scales_OG.repeat_interleave(inputs // scales_OG.shape[1], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("grid", "numerics"), KINDS)
def test_levels_times_scales_are_the_values(grid, numerics, group_size, tp_size, spec, dtype):
    w = random_weight(dtype, ROWS, INPUTS)
    quantizer = make_quantizer(grid, numerics, tp_size, group_size=group_size)
    codes, scales = quantizer.codes_scales(w, spec)
    values = quantizer.values(w, spec)
    assert (codes.dtype, scales.dtype, values.dtype) == (torch.int8, torch.float32, dtype)
    assert scales.shape == (ROWS, INPUTS // 16 if group_size == 16 else 1)
    assert set(codes.unique().tolist()) <= {*quantizer.grid.codes}
    made = codes.float() * quantizer.grid.code_unit * expand(scales, INPUTS)
    assert torch.equal(made.to(dtype), values)
    # Zeros are +0.
    assert not bool((values == 0).logical_and(values.signbit()).any())
    if group_size == "tensor":
        assert len(scales.unique()) == 1


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("grid", "numerics"), KINDS)
def test_a_value_that_is_not_finite_spoils_its_group(grid, numerics, group_size, tp_size):
    w = random_weight(torch.bfloat16, ROWS, INPUTS)
    w[5, 20] = math.nan
    quantizer = make_quantizer(grid, numerics, tp_size, group_size=group_size)
    codes, scales = quantizer.codes_scales(w, ROW)
    values = quantizer.values(w, ROW)
    spoilt = torch.zeros(ROWS, INPUTS, dtype=torch.bool)
    where = {16: (5, slice(16, 32)), -1: (5, slice(None)), "tensor": (slice(None), slice(None))}
    spoilt[where[group_size]] = True
    assert torch.equal(values.isnan(), spoilt)
    assert torch.equal(expand(scales, INPUTS).isnan(), spoilt)
    assert not codes[spoilt].any()


@pytest.mark.parametrize("group_size", [-1, "tensor"])
def test_slices_change_sums_and_no_maximum(group_size):
    # In float32 a 1 that is added to 2**24 is lost, and 1 + 1 of another slice is not.
    w = torch.zeros(4, 512)
    w[:, 0], w[:, 128::128] = 2.0**24, 1.0

    def scales(grid, tp_size, spec):
        return make_quantizer(grid, FP32, tp_size, group_size=group_size).codes_scales(w, spec)[1]

    assert not torch.equal(scales("ternary", 1, ROW), scales("ternary", 2, ROW))
    for grid, spec in (("ternary", COLUMN), ("five", ROW), ("half_sym4", ROW)):
        assert torch.equal(scales(grid, 1, spec), scales(grid, 2, spec))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("grid", "numerics"), KINDS)
def test_codes_of_a_pseudo_quantised_model_are_those_of_the_latent_one(
    grid, numerics, group_size, tp_size
):
    quantizer = make_quantizer(
        grid, numerics, tp_size, group_size=group_size, exclude=("*.1.mlp.linear_fc1",)
    )
    shapes = tensor_shapes(MODEL, 40).items()
    latent = MemorySource(
        path=Path("latent"),
        kind="torch_dist",
        form="latent",
        model=MODEL,
        vocab_size=40,
        quantizer=quantizer,
        tensors={
            name: random_weight(torch.bfloat16, *shape, seed=seed)
            for seed, (name, shape) in enumerate(shapes)
        },
    )
    values = {name: latent.forward_tensor(name) for name in latent.tensors}
    pseudo = dataclasses.replace(latent, form="pseudo", tensors=values)
    names = list(latent.quantized_tensors())
    assert len(names) == 14 - 2
    for name in names:
        codes, scales = latent.codes_scales(name)
        read, read_scales = pseudo.codes_scales(name)
        assert read.dtype == torch.int8 and read_scales.dtype == torch.float32
        assert torch.equal(read, codes), name
        # Read scales are rounded to bfloat16; a group of zeros has none.
        inputs = codes.shape[1]
        held = codes != 0
        wanted, found = (expand(s, inputs)[held] for s in (scales, read_scales))
        torch.testing.assert_close(found, wanted, rtol=2**-8, atol=0)
        assert torch.equal(pseudo.forward_tensor(name), values[name])


def test_what_is_quantised():
    quantizer = make_quantizer("ternary", FP32, group_size=16, full_precision_first_layers=1)
    place = find_projection("model.layers.0.self_attn.q_proj.weight")
    assert not quantizer.quantizes(place, 2)
    assert quantizer.quantizes(dataclasses.replace(place, layer=1), 2)
    assert quantizer.weights_per_scale(place, (32, 64)) == 16
    whole = make_quantizer("ternary", FP32, group_size="tensor")
    assert whole.weights_per_scale(place, (32, 64)) == 32 * 64
    assert whole.per_projection and not quantizer.per_projection


def test_float16_has_no_reciprocal():
    w = random_weight(torch.float16, ROWS, INPUTS)
    with pytest.raises(BitcpmError, match=r"^numerics=bf16_reciprocal: needs bfloat16 or float32"):
        make_quantizer("ternary", BF16_RECIPROCAL).values(w, COLUMN)
    make_quantizer("ternary", FP32).values(w, COLUMN)


# -- the stamp -------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("grid", "numerics"), KINDS)
def test_a_stamp_is_the_quantizer(grid, numerics, group_size):
    quantizer = make_quantizer(
        grid, numerics, 4, group_size=group_size, eps=1e-4, exclude=("*.mlp.*",)
    )
    assert Quantizer.from_stamp(quantizer.stamp(), Path("model")) == quantizer
    # How it was computed is not part of what it is.
    other = make_quantizer(
        grid,
        numerics,
        4,
        group_size=group_size,
        eps=1e-4,
        exclude=("*.mlp.*",),
        backend="reference",
        requantize="every_forward",
    )
    assert other.stamp() == quantizer.stamp()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numerics": "fp8"}, r"^numerics=fp8: the model's codes need fp32 or bf16_reciprocal\. "),
        ({"numerics": BF16_RECIPROCAL, "grid": "five"}, "for the ternary grid, not for five"),
        ({"tensor_model_parallel_size": 0}, "unreadable stamp: tensor_model_parallel_size 0"),
        ({"tensor_model_parallel_size": True}, "unreadable stamp: tensor_model_parallel_size True"),
        ({"tensor_model_parallel_size": math.inf}, "unreadable stamp"),
        ({"grid": "six"}, r"^quantizer=model: unreadable stamp: .*must be one of"),
        ({"group_size": 0}, "unreadable stamp: .*must be a whole number of at least 1"),
        ({"eps": 0}, "unreadable stamp"),
    ],
)
def test_other_stamps_are_refused(changes, message):
    stamp = Quantizer(QuantConfig()).stamp() | changes
    with pytest.raises(CheckpointError, match=message) as caught:
        Quantizer.from_stamp(stamp, Path("model"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stamp", [None, 3, [], "ternary", {}, {"numerics": "fp32"}])
def test_what_is_not_a_stamp_is_refused(stamp):
    with pytest.raises(CheckpointError, match=r"^quantizer=model: unreadable stamp: .*Use the pac"):
        Quantizer.from_stamp(stamp, Path("model"))
