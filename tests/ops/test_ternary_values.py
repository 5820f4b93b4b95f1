"""Values of the ternary operators, bit for bit, on every backend present."""

from functools import cache

import numpy as np
import numpy_ternary as expected
import pytest
import torch

from megatron_bitcpm import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
# (in_features, group_size): whole rows, whole vectors, a short last block, less than one vector.
LAYOUTS = [(4096, -1), (1024, 64), (1024, 256), (320, 32), (390, 130), (231, 77), (66, 3), (40, 1)]


def assert_same(actual: torch.Tensor, want_bits: np.ndarray) -> None:
    assert np.array_equal(expected.bits_of(actual), want_bits)


def make_weight(in_features: int, group_size: int, dtype: torch.dtype, rows: int) -> torch.Tensor:
    """Random rows of several sizes and, in the first ones, what goes wrong first."""
    gen = torch.Generator().manual_seed(in_features * 7 + group_size)
    w = torch.randn(rows, in_features, generator=gen)
    w[rows // 2 :] *= torch.rand(rows - rows // 2, 1, generator=gen) * 0.05
    w[-1] *= 1e-6  # below eps
    length = in_features if group_size == -1 else group_size
    w[0] = 0
    w[1] = -0.0
    w[2] = 0.7
    w[3, ::2], w[3, 1::2] = 3.0, -1.0  # mean 2 for an even length: 1 is a tie
    w[4, length // 2] = float("nan")
    w[5, 0] = float("inf")
    w[6, -1] = -float("inf")
    w = w.to(dtype)
    largest = torch.finfo(dtype).max
    w[7] = largest  # float32 and bfloat16 sums overflow
    w[8, 0] = largest
    w[9] = torch.finfo(dtype).smallest_normal / 2
    return w


@cache
def case(in_features: int, group_size: int, dtype: torch.dtype, rows: int = 24):
    w = make_weight(in_features, group_size, dtype, rows)
    length = in_features if group_size == -1 else group_size
    codes, scales = expected.quantize(w.float().numpy(), length, EPS)
    wq_bits = expected.level_bits(codes, scales, dtype)
    sums = expected.abs_sums(w.float().numpy(), length)
    return w, codes, scales, wq_bits, sums


def scale_bits(scales: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(scales), 0x7FC00000, scales.view(np.uint32)).astype(np.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "group_size"), LAYOUTS)
def test_all_operators_equal_numpy_bit_for_bit(backend, in_features, group_size, dtype):
    w, codes, scales, wq_bits, sums = case(in_features, group_size, dtype)
    before = w.clone()
    assert_same(ops.fake_quantize(w, group_size), wq_bits)
    got_codes, got_scales = ops.quantize(w, group_size)
    assert np.array_equal(got_codes.numpy(), codes)
    assert_same(got_scales, scale_bits(scales))
    assert_same(ops.abs_sums(w, group_size), scale_bits(sums))
    length = in_features if group_size == -1 else group_size
    assert_same(ops.scales_from_sums(torch.from_numpy(sums), length), scale_bits(scales))
    assert_same(ops.fake_quantize_with_scales(w, got_scales), wq_bits)
    assert np.array_equal(expected.bits_of(w), expected.bits_of(before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [-1, 64])
def test_a_million_random_values(backend, group_size, dtype):
    w, codes, scales, wq_bits, _ = case(4096, group_size, dtype, rows=320)
    assert w.numel() > 1_300_000
    assert_same(ops.fake_quantize(w, group_size), wq_bits)
    assert_same(ops.fake_quantize_(w.clone(), group_size), wq_bits)
    got_codes, got_scales = ops.quantize(w, group_size)
    assert np.array_equal(got_codes.numpy(), codes)
    assert_same(got_scales, scale_bits(scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_length_up_to_130(backend, dtype):
    for length in range(1, 131):
        w, codes, scales, wq_bits, _ = case(length, -1, dtype, rows=12)
        assert_same(ops.fake_quantize(w), wq_bits)
        got_codes, got_scales = ops.quantize(w)
        assert np.array_equal(got_codes.numpy(), codes), length
        assert_same(got_scales, scale_bits(scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_scale_and_its_neighbours(backend, dtype):
    gen = torch.Generator().manual_seed(3)
    scales = (torch.rand(8192, 1, generator=gen) + 0.01) * 0.1
    scales[::2] = scales[::2].to(dtype).float()  # so that s/2 is a value of the type: a true tie
    tie = (scales / 2).to(dtype)
    bits = tie.view(torch.int32 if dtype == torch.float32 else torch.int16)
    near = torch.cat([(bits + step).view(dtype) for step in range(-3, 4)], dim=1)
    w = torch.cat([near, -near], dim=1)
    codes = expected.codes_from_scales(w.float().numpy(), scales.numpy())
    assert (codes[::2, 3] == 0).all() and (codes[::2, 4] == 1).all()
    want = expected.level_bits(codes, scales.numpy(), dtype)
    assert_same(ops.fake_quantize_with_scales(w, scales), want)
    assert_same(ops.fake_quantize_with_scales_(w.clone(), scales), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(backend, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = every.reshape(256, 256)
    values = w.float().numpy()
    codes, scales = expected.quantize(values, 1, EPS)
    assert_same(ops.fake_quantize(w, 1), expected.level_bits(codes, scales, dtype))
    # 6.1e-5 and 1e-5 are below the normal float16 numbers.
    for scale in (3.7, 6.1e-5, 1e-5):
        scales = np.full((256, 1), scale, np.float32)
        codes = expected.codes_from_scales(values, scales)
        want = expected.level_bits(codes, scales, dtype)
        want = np.where(np.isfinite(values), want, expected.NAN_BITS[dtype])
        assert_same(ops.fake_quantize_with_scales(w, torch.from_numpy(scales)), want)


def test_scales_are_rounded_half_to_even(backend):
    # Scales on the midpoint of two bfloat16 / float16 values, and of float16 subnormals.
    w = torch.full((5, 2), 10.0)
    scales = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 3 * 2.0**-25, 5 * 2.0**-25]
    scales = torch.tensor(scales).unsqueeze(1)
    bf16 = ops.fake_quantize_with_scales(w.bfloat16(), scales)[:, 0].tolist()
    fp16 = ops.fake_quantize_with_scales(w.half(), scales)[:, 0].tolist()
    assert bf16[:3] == [1.0, 1 + 2**-6, 1.0]
    assert fp16[2:] == [1.0, 2 * 2.0**-24, 2 * 2.0**-24]
    largest = torch.full((1, 2), 65504.0).half()
    over = ops.fake_quantize_with_scales(largest, torch.tensor([[65520.0]]))
    assert over.tolist() == [[float("inf")] * 2]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_unusable_scales_show_as_nan(backend, scale):
    w = torch.ones(2, 8)
    scales = torch.tensor([[1.0, scale], [1.0, 1.0]])
    wq = ops.fake_quantize_with_scales(w, scales)
    assert wq.isnan().sum() == 4 and wq[0, 4:].isnan().all()


def test_non_finite_weights_under_finite_scales_show_as_nan(backend):
    for dtype in DTYPES:
        w = torch.ones(1, 70, dtype=dtype)
        w[0, 3], w[0, 68], w[0, 69] = float("nan"), float("inf"), -float("inf")
        wq = ops.fake_quantize_with_scales(w, torch.ones(1, 1))
        assert wq.isnan().nonzero()[:, 1].tolist() == [3, 68, 69]


def test_sums_added_in_rank_order_equal_the_full_row_scale(backend):
    from megatron_bitcpm.quant import groups

    w = case(4096, -1, torch.bfloat16)[0][10:]
    for tp in (1, 2, 4):
        gathered = [ops.abs_sums(part) for part in w.chunk(tp, dim=1)]
        total = gathered[0].numpy().copy()
        for sums in gathered[1:]:
            total = total + sums.numpy()
        assert_same(groups.add_in_rank_order(gathered), scale_bits(total))
        assert torch.equal(groups.abs_sums_sliced(w, tp), groups.add_in_rank_order(gathered))
    one = ops.fake_quantize_with_scales(w, ops.scales_from_sums(ops.abs_sums(w), 4096))
    assert torch.equal(one, ops.fake_quantize(w))
