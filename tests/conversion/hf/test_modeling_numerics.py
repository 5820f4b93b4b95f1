"""The quantiser of generated modelling files has the values of the operators, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.modeling_folders import quantizer

from megatron_bitcpm import ops
from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.conversion.hf.modeling.modeling_bitcpm import (
    LinearQuantizer,
    SteActivationQuantizer,
    WeightQuantizer,
)

pytestmark = pytest.mark.both_transformers

GRIDS = ["ternary", "asym4", "half_sym4", "int_sym4", "five"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DOWN = find_projection("model.layers.0.mlp.down_proj.weight")
GATE = find_projection("model.layers.0.mlp.gate_proj.weight")
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    kind = BITS[got.dtype]
    different = got.contiguous().view(kind) != want.contiguous().view(kind)
    assert not different.any(), f"{int(different.sum())} of {different.numel()}"


def hostile_weight(dtype, in_features=960):
    """Rows of every kind: random, zeros of both signs, ties, equal, tiny, huge, not finite."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randn(in_features, generator=generator) * 0.02 for _ in range(24)]
    rows += [torch.zeros(in_features), torch.full((in_features,), -0.0)]
    rows += [torch.full((in_features,), -0.25)]
    rows += [torch.tensor([0.5, -0.5, 1.5, -1.5]).repeat(in_features // 4)]  # mean 1: ties at 0.5
    rows += [torch.tensor([2.0, -2.0, 0.5, -0.5, 1.0, -1.5]).repeat(in_features // 6)]
    rows += [torch.randn(in_features, generator=generator) * scale for scale in (1e-7, 1e-6, 1e4)]
    rows += [rows[0] * 1e-38, torch.full((in_features,), 3e38)]
    for value in (math.nan, -math.inf):
        row = rows[1].clone()
        row[in_features // 2] = value
        rows.append(row)
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_values_are_those_of_the_operator(grid, dtype):
    w = hostile_weight(dtype)
    for group_size in (960, 64, 96, 5, 1):
        for eps in (1e-5, 0.02, 2.0**-126):
            got = WeightQuantizer(grid, "fp32", eps, group_size, 1)(w)
            assert_same_bits(got, ops.fake_quantize(w, group_size, eps, grid))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group_size", ["tensor", -1])
def test_slices_of_tensor_parallel_training(group_size, grid, dtype):
    w = hostile_weight(dtype)
    finite = w[w.isfinite().all(1)][:-1]
    for tp_size in (1, 2, 3, 4):
        stamp = quantizer(tp_size, grid=grid, group_size=group_size)
        size = 960 if group_size == -1 else "tensor"
        got = WeightQuantizer(grid, "fp32", 1e-5, size, tp_size)
        assert_same_bits(got(finite), stamp.values(finite, DOWN.spec))
        assert_same_bits(got(w), stamp.values(w, DOWN.spec))


def test_half_of_the_smallest_scales_is_not_rounded():
    unit = 2.0**-149
    eps = 2.0**-126 + 3 * unit  # half of it lies between two floats
    w = torch.tensor([[2.0**-127 + unit, 2.0**-127 + 2 * unit]])
    got = WeightQuantizer("ternary", "fp32", eps, 1, 1)(w)
    assert_same_bits(got, ops.fake_quantize(w, 1, eps))
    assert got.tolist() == [[0.0, eps]]


def test_the_order_of_the_sum_is_seen():
    """Otherwise the tests above could not tell one order from another."""
    w = hostile_weight(torch.bfloat16)[:24]
    sliced = [WeightQuantizer("ternary", "fp32", 1e-5, 960, tp)(w.float()) for tp in (1, 2)]
    assert not torch.equal(*sliced)
    mean = w.float().abs().mean(1)
    assert not torch.equal(ops.abs_sums(w)[:, 0] / 960, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [-1, 64, "tensor"])
def test_reciprocal_numerics(group_size, dtype):
    w = hostile_weight(dtype)
    stamp = quantizer(3, "bf16_reciprocal", group_size=group_size)
    size = 960 if group_size == -1 else group_size
    for weight in (w, w[:24]):
        got = WeightQuantizer("ternary", "bf16_reciprocal", 1e-5, size, 3)(weight)
        assert_same_bits(got, stamp.values(weight, DOWN.spec))
    if dtype == torch.bfloat16 and group_size == -1:
        other = WeightQuantizer("ternary", "fp32", 1e-5, size, 3)(w[:24])
        assert not torch.equal(got, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_are_those_of_the_operator(dtype):
    x = hostile_weight(dtype).view(2, -1, 960)
    for slices in (1, 3):
        want = ops.int8_per_token(x.unflatten(-1, (slices, -1))).flatten(-2)
        assert_same_bits(SteActivationQuantizer.apply(x, slices), want)


def linear(dtype=torch.float32, activation="none"):
    torch.manual_seed(0)
    module = LinearQuantizer(96, 32, WeightQuantizer("ternary", "fp32", 1e-5, 32, 1), activation)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_goes_straight_through(dtype):
    module = linear(dtype)
    x = torch.randn(5, 96, dtype=dtype, requires_grad=True)
    module(x).square().sum().backward()
    wq = ops.fake_quantize(module.weight.detach(), 32).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(x2, wq).square().sum().backward()
    assert torch.equal(module.weight.grad, wq.grad) and torch.equal(x.grad, x2.grad)
    assert module.weight.grad.dtype == dtype


def test_autocast_quantises_the_float32_weight():
    module = linear()
    x = torch.randn(5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        wq = module.quantized_weight()
    assert_same_bits(wq, ops.fake_quantize(module.weight.detach(), 32))
    assert_same_bits(y, torch.nn.functional.linear(x.bfloat16(), wq.bfloat16()))
    y.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32


def test_inputs_are_rounded_too_and_pass_their_gradient_on():
    module = linear(activation="int8_per_token")
    x = torch.randn(5, 96, requires_grad=True)
    y = module(x)
    rounded = ops.int8_per_token(x.detach())
    assert torch.equal(y, torch.nn.functional.linear(rounded, module.quantized_weight()))
    y.sum().backward()
    wanted = torch.ones(5, 32) @ module.quantized_weight().detach()
    assert torch.equal(x.grad, wanted)


@pytest.mark.slow
def test_compiled_values_are_the_same():
    module = linear()
    wq = torch.compile(lambda w: WeightQuantizer("five", "fp32", 1e-5, 32, 1)(w))
    weight = module.weight.detach()
    assert_same_bits(wq(weight), ops.fake_quantize(weight, 32, 1e-5, "five"))


def test_unknown_settings_are_refused():
    for grid, numerics in (
        ("six", "fp32"),
        ("ternary", "fp8"),
        ("five", "bf16_reciprocal"),
    ):
        with pytest.raises(ValueError, match=f"no grid '{grid}' with numerics '{numerics}'"):
            WeightQuantizer(grid, numerics, 1e-5, 64, 1)
    with pytest.raises(ValueError, match="unknown activation 'int4'"):
        linear(activation="int4")
    half = WeightQuantizer("ternary", "bf16_reciprocal", 1e-5, 64, 1)
    with pytest.raises(ValueError, match="needs bfloat16 or float32"):
        half(torch.zeros(2, 64, dtype=torch.float16))
