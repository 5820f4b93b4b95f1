"""The one contract: every backend gives the bits of `numpy_ternary`, for every grid and type."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from helpers import backends
from helpers import numpy_ternary as expected
from helpers.kernel_runner import KernelRunnerError
from helpers.operator_cases import DTYPES, LENGTHS, dtypes, make_activations

from megatron_bitcpm.errors import BitcpmError

EPS = 1e-5
# (in_features, group_size): whole rows, whole vectors, a short last block, less than one vector.
LAYOUTS = [
    (4096, -1),
    (1024, 64),
    (1024, 128),
    (1024, 256),
    (1152, 72),
    (320, 32),
    (64, 8),
    (390, 130),
    (231, 77),
    (66, 3),
    (40, 1),
    (17, -1),
]

grids = pytest.mark.parametrize("grid", expected.GRIDS)


def assert_same(actual: torch.Tensor, want_bits: np.ndarray) -> None:
    assert actual.is_contiguous()
    assert np.array_equal(expected.bits_of(actual), want_bits)


def uses(op: str, grid: str = "ternary") -> pytest.MarkDecorator:
    """Backends that declare themselves without it are not asked; `grid` parameters do the same."""
    return pytest.mark.uses(op=op, grid=grid)


def resolve(in_features: int, group_size: int) -> int:
    return in_features if group_size == -1 else group_size


def make_weight(in_features: int, group_size: int, dtype: torch.dtype, rows: int) -> torch.Tensor:
    """Random rows of several sizes and, in the first ones, what goes wrong first."""
    gen = torch.Generator().manual_seed(in_features * 7 + group_size)
    w = torch.randn(rows, in_features, generator=gen)
    w[rows // 2 :] *= torch.rand(rows - rows // 2, 1, generator=gen) * 0.05
    w[-1] *= 1e-6  # below eps
    length = resolve(in_features, group_size)
    w[0] = 0
    w[1] = -0.0
    w[2] = 0.7
    w[3, ::2], w[3, 1::2] = 3.0, -1.0  # mean 2 for an even length, maximum 3: 1 is a tie twice
    w[4, length // 2] = float("nan")
    w[5, 0] = float("inf")
    w[6, -1] = -float("inf")
    w[10, ::3], w[10, 1::3], w[10, 2::3] = -3.0, 0.0, -0.0  # a tie of asym4, zeros of both signs
    w = w.to(dtype)
    largest = torch.finfo(dtype).max
    w[7] = largest  # float32 and bfloat16 sums overflow
    w[8, 0] = -largest
    w[9] = torch.finfo(dtype).smallest_normal / 2
    w[9, ::2] *= -1
    return w


@cache
def case(in_features: int, group_size: int, dtype: torch.dtype, grid: str, rows: int = 24):
    w = make_weight(in_features, group_size, dtype, rows)
    length = resolve(in_features, group_size)
    codes, scales = expected.quantize(w.float().numpy(), length, EPS, grid)
    return w, codes, scales, expected.level_bits(codes, scales, dtype, grid)


def check_values(run, in_features, group_size, dtype, grid, rows=24):
    w, codes, scales, wq_bits = case(in_features, group_size, dtype, grid, rows)
    before = expected.bits_of(w)
    assert_same(run.fake_quantize(w, group_size, EPS, grid), wq_bits)
    assert_same(run.fake_quantize(w, group_size, EPS, grid, inplace=1), wq_bits)
    got_codes, got_scales = run.quantize(w, group_size, EPS, grid)
    assert got_codes.dtype == torch.int8 and np.array_equal(got_codes.numpy(), codes)
    assert_same(got_scales, expected.float32_bits(scales))
    assert_same(run.fake_quantize_with_scales(w, got_scales, grid), wq_bits)
    assert_same(run.fake_quantize_with_scales(w, got_scales, grid, inplace=1), wq_bits)
    assert np.array_equal(expected.bits_of(w), before)


@contextmanager
def naming(layout: tuple[int, int]) -> Iterator[None]:
    """Let a failure inside say at which of the layouts of a loop it happened."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"(in_features, group_size) = {layout}")
        raise


@dtypes
@grids
def test_values_codes_and_scales(run, dtype, grid):
    for layout in LAYOUTS:
        with naming(layout):
            check_values(run, *layout, dtype, grid)


def test_a_failure_names_its_layout():
    with pytest.raises(AssertionError) as caught, naming((66, 3)):
        raise AssertionError("other bits")
    assert caught.value.__notes__ == ["(in_features, group_size) = (66, 3)"]


@dtypes
@grids
def test_lengths_up_to_130(backend, run, dtype, grid):
    # Runners take a process call per operator, so they see the telling lengths only.
    every = grid == "ternary" and not backend.make
    for length in range(1, 131) if every else LENGTHS:
        with naming((length, -1)):
            check_values(run, length, -1, dtype, grid, rows=12)


@dtypes
def test_sums(run, dtype):
    for in_features, group_size in LAYOUTS:
        w = case(in_features, group_size, dtype, "ternary")[0]
        want = expected.abs_sums(w.float().numpy(), resolve(in_features, group_size))
        with naming((in_features, group_size)):
            assert_same(run.abs_sums(w, group_size), expected.float32_bits(want))


@dtypes
@pytest.mark.parametrize("group_size", [-1, 64])
def test_a_million_random_values(run, group_size, dtype):
    w, codes, scales, wq_bits = case(4096, group_size, dtype, "ternary", rows=320)
    assert w.numel() > 1_300_000
    assert_same(run.fake_quantize(w, group_size), wq_bits)
    got_codes, got_scales = run.quantize(w, group_size)
    assert np.array_equal(got_codes.numpy(), codes)
    assert_same(got_scales, expected.float32_bits(scales))


@pytest.mark.slow
@grids
def test_ten_million_values(run, grid):
    total = 0
    for dtype in DTYPES:
        for seed in range(6):
            w = make_adversarial(64, 10240, dtype, seed)
            codes, scales = expected.quantize(w.float().numpy(), 64, EPS, grid)
            got_codes, got_scales = run.quantize(w, 64, EPS, grid)
            assert np.array_equal(got_codes.numpy(), codes)
            assert_same(got_scales, expected.float32_bits(scales))
            want = expected.level_bits(codes, scales, dtype, grid)
            assert_same(run.fake_quantize(w, 64, EPS, grid), want)
            total += w.numel()
    assert total > 10_000_000


def make_adversarial(rows: int, cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Groups of 64 of many sizes: random ones, ones full of ties and their neighbours, bad ones."""
    gen = torch.Generator().manual_seed(seed)
    shape = (rows, cols // 64, 64)
    size = torch.exp2(torch.randint(-14, 12, (*shape[:2], 1), generator=gen).float())
    w = torch.randn(shape, generator=gen) * size
    # Scale 2 from the mean and from 3 / 1.5, or from 4 / 2: 1 and 3 are midpoints.
    by_mean = torch.tensor([3.0, -1.0, 1.0, -3.0]).repeat(16)
    by_max = torch.tensor([4.0, -1.0, 1.0, -3.0, 3.0, -4.0, 0.0, -0.0]).repeat(8)
    kind = torch.randint(0, 4, (*shape[:2], 1), generator=gen)
    w = torch.where(kind == 0, by_mean * size, torch.where(kind == 1, by_max * size, w)).to(dtype)
    # In half of the groups some values move to a neighbour; those of the largest values would move
    # the scale.
    bits = w.view(torch.int32 if dtype == torch.float32 else torch.int16)
    step = torch.randint(-1, 2, shape, generator=gen) * (w.abs() == size)
    step *= torch.rand(*shape[:2], 1, generator=gen) < 0.5
    w = (bits + step.to(bits.dtype)).view(dtype).reshape(rows, cols)
    every = torch.tensor([float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).max])
    odd = torch.randint(0, cols, (rows // 8,), generator=gen)
    w[: rows // 8, odd] = every.repeat(rows // 8)[: rows // 8].to(dtype)
    w[rows // 8, ::64] = torch.finfo(dtype).smallest_normal / 4
    return w


@dtypes
@grids
def test_midpoints_and_their_neighbours(run, dtype, grid):
    gen = torch.Generator().manual_seed(3)
    scales = (torch.rand(2048, 1, generator=gen) + 0.01) * 0.1
    scales[::2] = scales[::2].to(dtype).float()  # so that s/2 is a value of the type: a true tie
    near = []
    for midpoint in (0.5, 1.0, 1.5):
        tie = (scales * midpoint).to(dtype)
        bits = tie.view(torch.int32 if dtype == torch.float32 else torch.int16)
        near += [(bits + step).view(dtype) for step in range(-3, 4)]
    w = torch.cat([*near, *(-x for x in near), torch.zeros(2048, 1).to(dtype)], dim=1)
    codes = expected.codes_from_scales(w.float().numpy(), scales.numpy(), grid)
    below, above = {"ternary": (0, 1), "asym4": (0, 1), "five": (0, 1)}.get(grid, (1, 1))
    assert (codes[::2, 3] == below).all() and (codes[::2, 4] == above).all()
    want = expected.level_bits(codes, scales.numpy(), dtype, grid)
    assert_same(run.fake_quantize_with_scales(w, scales, grid), want)
    assert_same(run.fake_quantize_with_scales(w, scales, grid, inplace=1), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@grids
def test_every_16_bit_pattern(run, dtype, grid):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = every.reshape(256, 256)
    values = w.float().numpy()
    codes, scales = expected.quantize(values, 1, EPS, grid)
    assert_same(run.fake_quantize(w, 1, EPS, grid), expected.level_bits(codes, scales, dtype, grid))
    # 6.1e-5 and 1e-5 are below the normal float16 numbers; 1.2e38 * 1.5 is a number, 3e38 * 2 none.
    for scale in (3.7, 6.1e-5, 1e-5, 1.2e38, 3e38):
        scales = np.full((256, 1), scale, np.float32)
        codes = expected.codes_from_scales(values, scales, grid)
        want = expected.level_bits(codes, scales, dtype, grid)
        want = np.where(np.isfinite(values), want, expected.NAN_BITS[dtype])
        assert_same(run.fake_quantize_with_scales(w, torch.from_numpy(scales), grid), want)


@dtypes
@grids
def test_scales_below_the_normal_numbers(run, dtype, grid):
    # An odd multiple of the smallest number: half of it is none, 1.5 times it rounds.
    steps = torch.tensor([[1], [2], [3], [5], [7], [2**22 + 1]], dtype=torch.int32)
    scales = steps.view(torch.float32)
    w = (torch.arange(-16, 16, dtype=torch.int32).abs().view(torch.float32)).repeat(6, 1)
    w[:, :16] *= -1
    w = w.to(dtype)
    codes = expected.codes_from_scales(w.float().numpy(), scales.numpy(), grid)
    want = expected.level_bits(codes, scales.numpy(), dtype, grid)
    assert_same(run.fake_quantize_with_scales(w, scales, grid), want)


def test_scales_are_rounded_half_to_even(run):
    # Scales on the midpoint of two bfloat16 / float16 values, and of float16 subnormals.
    w = torch.full((5, 2), 10.0)
    scales = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 3 * 2.0**-25, 5 * 2.0**-25]
    scales = torch.tensor(scales).unsqueeze(1)
    bf16 = run.fake_quantize_with_scales(w.bfloat16(), scales)[:, 0].tolist()
    fp16 = run.fake_quantize_with_scales(w.half(), scales)[:, 0].tolist()
    assert bf16[:3] == [1.0, 1 + 2**-6, 1.0]
    assert fp16[2:] == [1.0, 2 * 2.0**-24, 2 * 2.0**-24]
    largest = torch.full((1, 2), 65504.0).half()
    over = run.fake_quantize_with_scales(largest, torch.tensor([[65520.0]]))
    assert over.tolist() == [[float("inf")] * 2]


@uses("fake_quantize_with_scales", "half_sym4")
def test_a_level_of_one_and_a_half_is_rounded_once(run):
    # 1.5 * s is a float32; rounding s to bfloat16 first would give 1.5, not 1.5 + 2^-7.
    scales = torch.tensor([[1 + 2**-8 + 2**-20]])
    wq = run.fake_quantize_with_scales(torch.tensor([[9.0, -9.0]]).bfloat16(), scales, "half_sym4")
    assert wq.tolist() == [[1.5 + 2**-7, -1.5 - 2**-7]]


@grids
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_unusable_scales_show_as_nan(run, scale, grid):
    w = torch.ones(2, 8)
    scales = torch.tensor([[1.0, scale], [1.0, 1.0]])
    wq = run.fake_quantize_with_scales(w, scales, grid)
    assert wq.isnan().sum() == 4 and wq[0, 4:].isnan().all()


@dtypes
@grids
def test_non_finite_weights_under_finite_scales_show_as_nan(run, dtype, grid):
    w = torch.ones(1, 70, dtype=dtype)
    w[0, 3], w[0, 68], w[0, 69] = float("nan"), float("inf"), -float("inf")
    wq = run.fake_quantize_with_scales(w, torch.ones(1, 1), grid)
    assert wq.isnan().nonzero()[:, 1].tolist() == [3, 68, 69]


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 64, 96, 127, 128, 129, 200, 256, 1000, 4160])
def test_two_bits_per_code(backend, run, cols):
    gen = torch.Generator().manual_seed(cols)
    for rows in (1, 3, 17, 257):
        codes = torch.randint(-1, 2, (rows, cols), generator=gen, dtype=torch.int8)
        packed = run.pack2(codes)
        assert packed.dtype == torch.uint8
        assert np.array_equal(packed.numpy(), expected.pack2(codes.numpy()))
        if "unpack2" not in backend.lacks:
            assert torch.equal(run.unpack2(packed, cols), codes)


@uses("refusal of codes")
@pytest.mark.parametrize("code", [2, -2, 127, -128])
@pytest.mark.parametrize("place", [(0, 0), (2, 129), (4, 199)])
def test_codes_that_are_not_ternary_are_refused(run, code, place):
    codes = torch.zeros(6, 200, dtype=torch.int8)
    codes[place] = code
    codes[5, 7] = code
    with pytest.raises((BitcpmError, KernelRunnerError), match=rf"codes\[{place[0]}[,\]]"):
        run.pack2(codes)


@uses("unpack2")
@pytest.mark.parametrize("place", [(0, 0), (2, 40), (4, 63)])
@pytest.mark.parametrize("shift", [0, 6])
def test_fields_of_three_are_refused(run, place, shift):
    # In 200 inputs the last bytes of the second block hold padding in their upper fields.
    packed = torch.full((6, 64), 0b01010101, dtype=torch.uint8)
    packed[place] |= 3 << shift
    packed[5, 0] |= 3
    with pytest.raises((BitcpmError, KernelRunnerError), match=rf"packed\[{place[0]}[,\]]"):
        run.unpack2(packed, 200)


@uses("int8_per_token")
@dtypes
def test_int8_per_token(run, dtype):
    for cols in [*LENGTHS, 255, 1000, 4096]:
        x = make_activations(cols, dtype)
        want = expected.int8_per_token_bits(x.float().numpy(), dtype)
        assert_same(run.int8_per_token(x), want)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=row.marks) for row in backends.RUNNERS]
)
def test_what_a_row_declares_absent_is_refused(row, built_runners):
    backends.require(row, row.find_absence())
    if row.make not in built_runners:
        row.build()
        built_runners.add(row.make)
    w = torch.ones(2, 64)
    calls = {
        "fake_quantize": lambda run: run.fake_quantize(w),
        "quantize": lambda run: run.quantize(w),
        "abs_sums": lambda run: run.abs_sums(w),
        "fake_quantize_with_scales": lambda run: run.fake_quantize_with_scales(w, w[:, :1]),
        "pack2": lambda run: run.pack2(w.to(torch.int8)),
        "unpack2": lambda run: run.unpack2(torch.full((2, 32), 85, dtype=torch.uint8), 64),
        "int8_per_token": lambda run: run.int8_per_token(w),
    }
    for grid in expected.GRIDS:
        calls[grid] = lambda run, grid=grid: run.fake_quantize(w, grid=grid)
    refused = set()
    with row.run() as run:
        for name, call in calls.items():
            try:
                call(run)
            except KernelRunnerError as error:
                assert not error.died and "\n" not in str(error)
                refused.add(name)
    assert refused == (row.lacks & set(calls)) | (set(expected.GRIDS) - row.grids)


@pytest.mark.npu
def test_an_ascend_device_is_present():
    row = next(row for row in backends.BACKENDS if row.name == "npu")
    backends.require(row, row.find_absence())
    with row.run() as run:
        check_values(run, 4096, 64, torch.bfloat16, "ternary")


@pytest.mark.parametrize("row", backends.RUNNERS, ids=lambda row: row.name)
def test_a_runner_that_is_built_gives_the_right_bits(row, built_runners):
    # Building takes long, running does not: the slow tests build.
    backends.require(row, row.find_absence())
    if not row.is_built():
        pytest.skip(f"{row.name} is not up to date: make {' '.join(row.make)}")
    with row.run() as run:
        for dtype in DTYPES:
            check_values(run, 320, 32, dtype, "ternary")
            check_values(run, 390, 130, dtype, "ternary")
        if "five" in row.grids:
            check_values(run, 231, 77, torch.bfloat16, "half_sym4")
        codes = torch.tensor(case(390, 130, torch.float32, "ternary")[1])
        assert np.array_equal(run.pack2(codes).numpy(), expected.pack2(codes.numpy()))
