"""The Ascend C kernels, compiled with g++ against the host check, equal the reference bit for bit.

The host check runs the kernel files as they are on a strict model of a vector core: it fails on
every broken rule of the API, so a result that comes back was computed legally. Expected values are
those of the reference (`megatron_bitcpm.quant`).
"""

from __future__ import annotations

import itertools
import math
import subprocess

import pytest
import torch
from helpers.host_check import build_host_check
from helpers.kernel_runner import (
    DTYPE_NAMES,
    KernelRunner,
    KernelRunnerError,
    RunnerOperators,
    float_bits,
)

from megatron_bitcpm.quant import fake_quant, packing, scales

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP_SIZES = (8, 16, 24, 32, 64, 72, 128, 136, 256, 512, -1)
SAMPLE = (8, 24, 64, 128, -1)  # of the group sizes, in the fast suite
GROUP_PARAMS = [pytest.param(g, marks=() if g in SAMPLE else pytest.mark.slow) for g in GROUP_SIZES]
CORES = (1, 3, 40, 48)
# hidden and ffn sizes of the four released models; rows are cut short.
RELEASED = (1024, 2048, 2560, 4096, 6144, 10240, 16384)
OUTPUTS = (("wq",), ("codes", "scales"), ("wq", "codes", "scales"), ("scales",), ("codes",))
INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@pytest.fixture(scope="module")
def runner():
    """The runner process, brought up to date."""
    with KernelRunner([str(build_host_check("runner"))]) as process:
        yield process


def to_bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INT_OF_SIZE[x.element_size()])


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype, what
    differs = to_bits(got) != to_bits(expected)
    assert not differs.any(), f"{what}: {int(differs.sum())} of {got.numel()} differ"


def plant_specials(w_OI: torch.Tensor, group_len: int) -> torch.Tensor:
    """Overwrite every second group, in turn, with what quantisers get wrong."""
    info = torch.finfo(w_OI.dtype)
    groups = w_OI.view(-1, group_len)
    for i, group in enumerate(groups[1::2]):
        n = i % 11
        if n == 0:  # all zero, of both signs
            group.zero_()
            group[::2] = -0.0
        elif n == 1:  # a mean of exactly 0.5, magnitudes at 0.25 and its neighbours
            group.fill_(0.5)
            edge = torch.tensor([0.25, -0.25], dtype=w_OI.dtype)
            below = edge.nextafter(torch.zeros_like(edge)) if w_OI.dtype.itemsize == 4 else edge
            group[: group_len // 4] = 0.25
            group[group_len // 4 : group_len // 4 * 2] = -0.75
            group[-1:] = below[1]
        elif n == 2:
            group[i % group_len] = math.nan
        elif n == 3:
            group[i % group_len] = -math.inf
        elif n == 4:  # a NaN of the other sign
            to_bits(group)[-1] = -1
        elif n == 5:  # the sum of finite numbers overflows, in float32's range
            group.fill_(info.max)
        elif n == 6:
            group.fill_(-info.smallest_normal / 4)
        elif n == 7:  # one large number among zeros
            group.zero_()
            group[-1] = -info.max / 2
        elif n == 8:
            group[:] = torch.where(group < 0, -info.tiny, info.tiny)
        elif n == 9:  # infinities of both signs
            group[0], group[-1] = math.inf, -math.inf
        else:  # equal magnitudes: all are taken
            group.copy_(group.sign() * 0.03125)
    return w_OI


def make_weights(rows: int, cols: int, dtype: torch.dtype, group_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 7919 + cols)
    w = torch.randn(rows, cols, generator=generator) * 0.02
    return plant_specials(w.to(dtype), cols if group_size == -1 else group_size)


def run_fake_quantize(runner, w, group_size, names, eps=1e-5, **keys):
    rows, cols = w.shape
    group_len = cols if group_size == -1 else group_size
    shapes = {
        "wq": (w.dtype, (rows, cols)),
        "codes": (torch.int8, (rows, cols)),
        "scales": (torch.float32, (rows, cols // group_len)),
    }
    return runner.call(
        "fake_quantize",
        {"w": w},
        {name: shapes[name] for name in names},
        dtype=DTYPE_NAMES[w.dtype],
        rows=rows,
        cols=cols,
        group_len=group_len,
        eps=float_bits(eps),
        **keys,
    )


def expect_fake_quantize(w, group_size, eps=1e-5):
    codes, group_scales = fake_quant.quantize(w, group_size, eps)
    wq = fake_quant.fake_quantize(w, group_size, eps)
    return {"wq": wq, "codes": codes, "scales": group_scales}


def check_fake_quantize(runner, w, group_size, selections=OUTPUTS[:3], eps=1e-5, **keys):
    """All outputs of w equal the reference, in each selection of outputs; returns the counts."""
    expected = expect_fake_quantize(w, group_size, eps)
    for names in selections:
        got, stats = run_fake_quantize(runner, w, group_size, names, eps, **keys)
        for name in names:
            where = (name, w.dtype, tuple(w.shape), group_size, names, keys)
            assert_same_bits(got[name], expected[name], where)
    return stats


def list_devices():
    """Core counts, core orders, what maximum instructions do with NaN and casts with infinity."""
    modes = itertools.product(("propagate", "drop"), (0, 1), CORES)
    return [
        {"blocks": blocks, "seed": seed, "nan": nan, "sat": sat}
        for seed, (nan, sat, blocks) in enumerate(modes)
    ]


def rotate_devices():
    """Some of them in turn for ever, such that few tests see every mode and core count."""
    return itertools.cycle(list_devices()[i] for i in (0, 5, 10, 15, 4, 1, 14, 11))


def list_widths(group_size: int, limit: int = 16384) -> list[int]:
    """Row lengths for a group size: one group, three groups, some, and the longest row."""
    if group_size == -1:
        return [1, 5, 31, 64, 100, 1000, 2048, 6144, 10241, 13001, limit]
    return [
        group_size,
        3 * group_size,
        1000 // group_size * group_size or group_size,
        limit // group_size * group_size,
    ]


# ---- fake_quantize and quantize ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("group_size", GROUP_PARAMS)
def test_fake_quantize_equals_reference(runner, dtype, group_size):
    devices = rotate_devices()
    for cols in list_widths(group_size, 2048):
        w = make_weights(1 if cols > 9000 else 23, cols, dtype, group_size)
        check_fake_quantize(runner, w, group_size, **next(devices))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_fake_quantize_equals_reference_on_the_full_grid(runner, dtype, group_size):
    for cols, rows in itertools.product(list_widths(group_size), (1, 7, 101)):
        if rows * cols > 200_000:
            continue
        w = make_weights(rows, cols, dtype, group_size)
        expected = expect_fake_quantize(w, group_size)
        for device in list_devices():
            names = OUTPUTS[(device["seed"] + rows) % len(OUTPUTS)]
            got, _ = run_fake_quantize(runner, w, group_size, names, **device)
            for name in names:
                assert_same_bits(got[name], expected[name], (name, cols, rows, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("cols", [40000, 70001, 16385])
def test_rows_beyond_the_buffer_equal_reference(runner, dtype, cols):
    w = make_weights(2, cols, dtype, -1)
    stats = check_fake_quantize(runner, w, -1, OUTPUTS[2:3], blocks=3)
    size = w.numel() * w.element_size()
    twice = int(stats["bytes_read"]) == 2 * size
    assert twice or int(stats["bytes_read"]) == size
    if cols == 70001:  # the fall-back is in use
        assert twice


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("ub_kib", [32, 48, 100])
def test_small_buffers_change_the_plan_and_no_bit(runner, dtype, ub_kib):
    for cols, group_size in ((6000, -1), (4096, 1024), (999, -1), (1536, 24), (12001, -1)):
        w = make_weights(3, cols, dtype, group_size)
        keys = {"blocks": 2, "seed": cols, "ub": ub_kib * 1024}
        stats = check_fake_quantize(runner, w, group_size, OUTPUTS[:3:2], **keys)
        assert int(stats["ub_bytes"]) <= (ub_kib - 8) * 1024


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("eps", [1.1754943508222875e-38, 1e-7, 0.5, 7e4, 3.4e38])
def test_eps_over_its_whole_range(runner, dtype, eps):
    """Up to scales that overflow when they are rounded to 16 bits."""
    for (rows, cols, group_size), sat in itertools.product(((4, 512, 64), (23, 100, -1)), (0, 1)):
        w = make_weights(rows, cols, dtype, group_size)
        w[0, :8] = torch.tensor([6e4, -6e4, 4e4, 3e38, -3e38, 1e5, 1e-38, 0.3]).to(dtype)
        check_fake_quantize(runner, w, group_size, OUTPUTS[2:3], eps=eps, blocks=3, sat=sat)
        tiny = make_weights(rows, cols, dtype, group_size) * 2.0**-121
        check_fake_quantize(runner, tiny, group_size, OUTPUTS[2:3], eps=eps, blocks=3, sat=sat)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_in_place(runner, dtype):
    for cols, group_size, keys in (
        (1024, 64, {"blocks": 40}),
        (1000, -1, {"blocks": 3}),
        (40001, -1, {"blocks": 2}),
        (72, 24, {"blocks": 1}),
        (5000, -1, {"blocks": 2, "ub": 40960}),
    ):
        w = make_weights(5, cols, dtype, group_size)
        operators = RunnerOperators(runner, **keys)
        expected = fake_quant.fake_quantize(w, group_size)
        assert_same_bits(operators.fake_quantize(w, group_size, inplace=1), expected, cols)
        some = make_scales(w, group_size)
        expected = fake_quant.fake_quantize_with_scales(w, some)
        got = operators.fake_quantize_with_scales(w, some, inplace=1)
        assert_same_bits(got, expected, cols)


def test_order_of_the_sum_is_visible():
    """The weights of these tests tell the canonical order from another."""
    w = make_weights(23, 4096, torch.bfloat16, -1)[::2]
    other = w.float().abs().sum(1, keepdim=True)
    assert (other != scales.abs_sums(w)).any()


# ---- abs_sums, fake_quantize_with_scales ---------------------------------------------------------


def make_scales(w: torch.Tensor, group_size: int) -> torch.Tensor:
    """Scales near those of w, some of them unusable or odd."""
    made = scales.abs_sums(w.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1), group_size)
    made = made / (w.shape[1] // made.shape[1]) * 0.9 + 1e-6
    odd = (math.nan, 0.0, -1.0, math.inf, 1e-40, -0.0, 7e4, -math.nan, 3.4e38, -math.inf)
    for i, value in enumerate(odd):
        made.view(-1)[3 + 5 * i :: 5 * len(odd)] = value
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("group_size", GROUP_PARAMS)
def test_abs_sums_and_given_scales_equal_reference(runner, dtype, group_size):
    devices = rotate_devices()
    for cols in list_widths(group_size, 2048):
        rows = 1 if cols > 9000 else 19
        w = make_weights(rows, cols, dtype, group_size)
        keys = next(devices)
        operators = RunnerOperators(runner, **keys)
        where = (cols, rows, keys)
        expected = scales.abs_sums(w, group_size)
        assert_same_bits(operators.abs_sums(w, group_size), expected, where)
        for some in (make_scales(w, group_size), torch.rand_like(expected) * 0.05):
            expected = fake_quant.fake_quantize_with_scales(w, some)
            assert_same_bits(operators.fake_quantize_with_scales(w, some), expected, where)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_abs_sums_and_given_scales_equal_reference_on_the_full_grid(runner, dtype, group_size):
    for cols, rows in itertools.product(list_widths(group_size), (1, 7, 101)):
        if rows * cols > 100_000:
            continue
        w = make_weights(rows, cols, dtype, group_size)
        sums, some = scales.abs_sums(w, group_size), make_scales(w, group_size)
        levels = fake_quant.fake_quantize_with_scales(w, some)
        for device in list_devices():
            operators = RunnerOperators(runner, **device)
            where = (cols, rows, device)
            assert_same_bits(operators.abs_sums(w, group_size), sums, where)
            assert_same_bits(operators.fake_quantize_with_scales(w, some), levels, where)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_abs_sums_and_given_scales_of_long_rows(runner, dtype):
    for cols, ub in ((16384, 196608), (50001, 196608), (4099, 40960)):
        w = make_weights(3, cols, dtype, -1)
        operators = RunnerOperators(runner, blocks=2, ub=ub)
        assert_same_bits(operators.abs_sums(w), scales.abs_sums(w), cols)
        assert int(operators.stats["bytes_read"]) == w.numel() * w.element_size()
        some = torch.tensor([[0.02], [0.01], [0.03]])
        expected = fake_quant.fake_quantize_with_scales(w, some)
        assert_same_bits(operators.fake_quantize_with_scales(w, some), expected, cols)
        assert int(operators.stats["bytes_read"]) == w.numel() * w.element_size() + 12


# ---- pack2 ---------------------------------------------------------------------------------------


PACK_SHAPES = [
    (1, 128),
    (3, 64),
    (7, 1000),
    (200, 130),
    (5, 1),
    (3, 31),
    (3, 33),
    (2, 16384),
    (1, 100000),
    (1, 200001),
    (101, 96),
    (40, 4096),
]


def check_pack2(runner, rows, cols, devices):
    codes = torch.randint(-1, 2, (rows, cols), dtype=torch.int8)
    expected = packing.pack2(codes)
    for device in devices:
        got = RunnerOperators(runner, **device).pack2(codes)
        assert_same_bits(got, expected, (rows, cols, device))


def test_pack2_equals_reference(runner):
    devices = rotate_devices()
    for rows, cols in PACK_SHAPES:
        check_pack2(runner, rows, cols, itertools.islice(devices, 3))


@pytest.mark.slow
def test_pack2_equals_reference_on_the_full_grid(runner):
    for rows, cols in PACK_SHAPES:
        check_pack2(runner, rows, cols, list_devices())


def test_pack2_of_invalid_codes_is_code_plus_one_modulo_four(runner):
    """A device cannot raise; other codes and rows stay what they are."""
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(2, 128)
    got = RunnerOperators(runner, blocks=1).pack2(codes)
    fields = ((codes.to(torch.int16) + 1) % 4).reshape(2, 4, 32)
    expected = (fields * torch.tensor([1, 4, 16, 64])[:, None]).sum(1).to(torch.uint8)
    assert torch.equal(got, expected)


# ---- work: cores, bytes, passes ------------------------------------------------------------------


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("group_size", [64, -1])
def test_all_cores_work(runner, cores, group_size):
    w = make_weights(50, 256, torch.bfloat16, group_size)
    stats = check_fake_quantize(runner, w, group_size, OUTPUTS[:1], blocks=cores)
    assert int(stats["blocks"]) == cores
    one = make_weights(1, 256, torch.bfloat16, group_size)
    stats = check_fake_quantize(runner, one, group_size, OUTPUTS[:1], blocks=cores)
    assert int(stats["blocks"]) == min(cores, 256 // (group_size if group_size > 0 else 256))


@pytest.mark.parametrize("cols", RELEASED)
def test_bf16_work_per_element_on_released_shapes(runner, cols):
    """At most 4.08 bytes and 9 full-rate passes; every row is read once."""
    for group_size in (32, 64, 128, 256, -1):
        w = make_weights(max(2, 12288 // cols), cols, torch.bfloat16, group_size)
        stats = check_fake_quantize(runner, w, group_size, OUTPUTS[:1], blocks=1)
        moved = int(stats["bytes_read"]) + int(stats["bytes_written"])
        assert int(stats["bytes_read"]) == 2 * w.numel()
        assert moved / w.numel() <= 4.08
        assert float(stats["passes"]) <= 9
        assert int(stats["ub_bytes"]) <= 184 * 1024


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("cols", RELEASED)
def test_released_rows_are_read_once(runner, dtype, cols):
    w = make_weights(2, cols, dtype, -1)
    stats = check_fake_quantize(runner, w, -1, OUTPUTS[2:3], blocks=2)
    assert int(stats["bytes_read"]) == w.numel() * w.element_size()
    assert int(stats["bytes_written"]) == w.numel() * (w.element_size() + 1) + 2 * 4


def test_model_prints_the_table(runner):
    done = subprocess.run([*runner.command, "model"], capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows]
    head = rows[0]
    assert head[:4] == ["operator", "type", "g", "shape"]
    bf16 = [
        dict(zip(head, row, strict=True))
        for row in rows[1:]
        if row[:2] == ["fake_quantize", "bf16"] and row[2] in ("64", "128", "256", "row")
    ]
    assert len(bf16) >= 12
    for row in bf16:
        assert float(row["bytes/element"]) <= 4.08
        assert float(row["passes/element"]) <= 9
    assert "model" in done.stdout and "not a measurement" in done.stdout


# ---- what is refused -----------------------------------------------------------------------------


def test_refusals_are_one_line(runner):
    w = make_weights(2, 96, torch.bfloat16, -1)
    for keys, message in (
        ({"blocks": 0}, "no vector cores"),
        ({"ub": 4096}, "unified buffer is below"),
        ({"nan": "maybe"}, "nan=maybe"),
        ({"grid": "five"}, "grid=five has no Ascend kernel"),
    ):
        with pytest.raises(KernelRunnerError, match=message) as caught:
            run_fake_quantize(runner, w.repeat(1, 100), -1, ("wq",), **keys)
        assert not caught.value.died
    with pytest.raises(KernelRunnerError, match="group does not divide the row"):
        shape = {"rows": 2, "cols": 96, "group_len": 36, "dtype": "bf16", "eps": float_bits(1e-5)}
        runner.call("fake_quantize", {"w": w}, {"wq": (w.dtype, (2, 96))}, **shape)


@pytest.mark.parametrize(("rows", "cols"), [(0, 64), (3, 0)])
def test_nothing_to_do_is_no_launch(runner, rows, cols):
    w = torch.zeros(rows, cols)
    _, stats = run_fake_quantize(runner, w, 64 if cols else 1, ("wq",))
    assert stats["blocks"] == "0" and stats["bytes_read"] == "0"
