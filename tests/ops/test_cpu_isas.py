"""Every instruction set gives the same bits as the reference, on random and adversarial values.

The sets of this processor run in the compiled module; those of 64-bit Arm in the check runner,
built with a cross compiler, under an emulator. Values: midpoints between levels and their float
neighbours, any bit pattern (NaNs of every payload), subnormals, zeros of both signs, single
infinities and NaNs, sums that overflow; rows of 1 to 130 values, so every remainder of a vector and
groups of one.
"""

import contextlib

import numpy as np
import pytest
import torch
from helpers.backends import BACKENDS, require
from helpers.kernel_runner import KernelRunnerError, RunnerOperators

from megatron_bitcpm import ops
from megatron_bitcpm.ops import _cpu
from megatron_bitcpm.quant import activation, fake_quant, packing, scales, sums
from megatron_bitcpm.quant.grids import GRIDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = range(1, 131)
ARM_ROWS = ("cpu:neon-qemu", "cpu:generic-qemu")
# Subnormals count only where eps does not hide them.
EPS = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 1e-5}


# ---- values -------------------------------------------------------------------------------------


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    signed = bits.astype({4: np.uint32, 2: np.uint16}[dtype.itemsize])
    return torch.from_numpy(signed.view({4: np.int32, 2: np.int16}[dtype.itemsize])).view(dtype)


def to_bits(x: torch.Tensor) -> np.ndarray:
    if not x.is_floating_point():
        return x.numpy()
    width = {4: torch.int32, 2: torch.int16}[x.element_size()]
    return x.contiguous().view(width).numpy()


def highest_bits(dtype: torch.dtype) -> int:
    """Bit pattern of infinity."""
    return {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]


def jitter(x: torch.Tensor, rng: np.random.Generator, chance: float = 0.5) -> torch.Tensor:
    """Move some values to a float neighbour, one or two steps, and give them random signs."""
    bits = to_bits(x.abs()).astype(np.int64)
    steps = rng.integers(-2, 3, bits.shape) * (rng.random(bits.shape) < chance) * (bits > 2)
    sign = rng.integers(0, 2, bits.shape) << (8 * x.element_size() - 1)
    moved = np.where(bits + steps < highest_bits(x.dtype), bits + steps, bits)
    return from_bits(moved | sign, x.dtype)


def short_numbers(rng, shape) -> np.ndarray:
    """Numbers whose small multiples are exact in every type."""
    return rng.integers(1, 16, shape) * 2.0 ** rng.integers(-12, -3, shape)


def normal(rng, dtype, rows, cols):
    return torch.from_numpy(rng.normal(0, 0.02, (rows, cols))).to(dtype)


def ties_of_the_mean(rng, dtype, rows, cols):
    # The mean of m and 3m is 2m: m lies on the midpoint.
    factors = np.where(np.arange(cols) % 2, 3.0, 1.0)
    return jitter(torch.from_numpy(short_numbers(rng, (rows, 1)) * factors).to(dtype), rng, 0.02)


def ties_of_the_maximum(rng, dtype, rows, cols):
    # The largest is 1.5 m or 2 m, so m is the scale of some grids and the rest is on midpoints.
    unit = short_numbers(rng, (rows, 1))
    largest = np.where(np.arange(rows)[:, None] % 2, 1.5, 2.0)
    x = jitter(torch.from_numpy(unit * rng.choice([0.5, 1.0, 1.5], (rows, cols))).to(dtype), rng)
    first = torch.from_numpy(unit * largest * rng.choice([-1.0, 1.0], (rows, 1))).to(dtype)
    x = torch.minimum(torch.maximum(x, -first.abs()), first.abs())
    x[:, -1:] = first
    return x


def any_bits(rng, dtype, rows, cols):
    return from_bits(rng.integers(0, 1 << 8 * dtype.itemsize, (rows, cols)), dtype)


def finite_bits(rng, dtype, rows, cols):
    sign = rng.integers(0, 2, (rows, cols)) << (8 * dtype.itemsize - 1)
    return from_bits(rng.integers(0, highest_bits(dtype), (rows, cols)) | sign, dtype)


def subnormals(rng, dtype, rows, cols):
    smallest_normal = to_bits(torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype))
    sign = rng.integers(0, 2, (rows, cols)) << (8 * dtype.itemsize - 1)
    return from_bits(rng.integers(0, 2 * int(smallest_normal), (rows, cols)) | sign, dtype)


def zeros(rng, dtype, rows, cols):
    x = torch.where(torch.from_numpy(rng.random((rows, cols)) < 0.5), 0.0, -0.0).to(dtype)
    x[1::2, cols // 2] = 0.5  # every second row has one more value
    return x


def one_bad(rng, dtype, rows, cols):
    x = normal(rng, dtype, rows, cols)
    sign = rng.integers(0, 2, rows) << (8 * dtype.itemsize - 1)
    payload = rng.integers(0, 4, rows)  # 0 is the infinity
    x[torch.arange(rows), torch.from_numpy(rng.integers(0, cols, rows))] = from_bits(
        (highest_bits(dtype) + payload) | sign, dtype
    )
    return x


def near_overflow(rng, dtype, rows, cols):
    # A few steps of the last place below the largest number; the sum of two overflows float32.
    return jitter(
        from_bits(highest_bits(dtype) - 1 - rng.integers(0, 32, (rows, cols)), dtype), rng
    )


KINDS = (
    normal,
    ties_of_the_mean,
    ties_of_the_maximum,
    any_bits,
    finite_bits,
    subnormals,
    zeros,
    one_bad,
    near_overflow,
)


def make_values(dtype: torch.dtype, rows: int, cols: int, seed: int) -> torch.Tensor:
    """[rows, cols], rows of every kind in turn."""
    rng = np.random.default_rng([seed, cols, dtype.itemsize])
    per_kind = -(-rows // len(KINDS))
    return torch.cat([kind(rng, dtype, per_kind, cols) for kind in KINDS])[:rows].contiguous()


def make_scales_and_ties(
    dtype: torch.dtype, rows: int, cols: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [rows, 1] of any size, some unusable, and weights around their midpoints."""
    rng = np.random.default_rng([seed, cols, dtype.itemsize, 1])
    exponents = {torch.float16: (-26, 16)}.get(dtype, (-140, 127))
    scale = rng.uniform(1, 2, (rows, 1)) * 2.0 ** rng.integers(*exponents, (rows, 1))
    scales_O1 = torch.from_numpy(scale).to(torch.float32)
    w = torch.from_numpy(scale * rng.choice([0.0, 0.5, 1.0, 1.5, 2.0], (rows, cols))).to(dtype)
    w = jitter(torch.where(w.isfinite(), w, 1.0), rng)
    w[::7, 0] = float("nan")
    bad = [0.0, -0.0, -1.0, float("inf"), float("nan"), 2.0**-149, 3.4e38]
    scales_O1[::5, 0] = torch.tensor(bad).repeat(rows)[: len(scales_O1[::5])]
    return w, scales_O1


# ---- implementations ----------------------------------------------------------------------------


class ModuleOperators:
    """The operators of the compiled module on one instruction set, as `RunnerOperators`."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def __getattr__(self, name: str):
        _cpu.select_isa(self.isa)
        return getattr(ops, name)

    def fake_quantize(self, w, group_size=-1, eps=1e-5, grid="ternary", inplace=0):
        _cpu.select_isa(self.isa)
        if not inplace:
            return ops.fake_quantize(w, group_size, eps, grid)
        halves = [half.clone() for half in w.split(len(w) // 2 + 1)]
        ops.foreach_fake_quantize_(halves, group_size, eps, grid)
        return torch.cat(halves)

    def fake_quantize_with_scales(self, w, scales, grid="ternary", inplace=0):
        _cpu.select_isa(self.isa)
        if not inplace:
            return ops.fake_quantize_with_scales(w, scales, grid)
        return ops.fake_quantize_with_scales_(w.clone(), scales, grid)


@pytest.fixture
def module_operators():
    if _cpu.native is None:
        pytest.skip(f"no compiled module: {_cpu.load_error}")
    yield {f"cpu:{isa}": ModuleOperators(isa) for isa in _cpu.native.supported_isas()}
    _cpu.select_isa("auto")


@pytest.fixture
def arm_operators():
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(use_row(name)) for name in ARM_ROWS}


@contextlib.contextmanager
def use_row(name: str):
    """The operators of one row of `backends`, built where need be."""
    row = next(row for row in BACKENDS if row.name == name)
    require(row, row.find_absence())
    row.build()
    with row.run() as operators:
        yield operators


# ---- comparison ---------------------------------------------------------------------------------


def assert_same_bits(name: str, got: torch.Tensor, want: torch.Tensor, inputs: torch.Tensor):
    got_bits, want_bits = to_bits(got), to_bits(want)
    if not np.array_equal(got_bits, want_bits):
        row, col = (int(i) for i in np.argwhere(got_bits != want_bits)[0])
        raise AssertionError(
            f"{name}: [{row}, {col}] is {got[row, col]}, not {want[row, col]}; "
            f"{int((got_bits != want_bits).sum())} of {got.numel()} differ; "
            f"input row {inputs[row].tolist()}"
        )


def assert_equal_to_the_reference(operators, dtype, rows, cols, seed):
    """All operators and grids, on one tensor of each sort; returns the values compared."""
    w = make_values(dtype, rows, cols, seed)
    w_ties, scales_O1 = make_scales_and_ties(dtype, rows, cols, seed)
    rng = np.random.default_rng([seed, cols])
    codes = torch.from_numpy(rng.integers(-1, 2, (rows, cols)).astype(np.int8))
    eps, inplace = EPS[dtype], cols % 2
    packed = packing.pack2(codes)
    checks = [
        ("abs_sums", lambda o: o.abs_sums(w), sums.sum_abs_canonical(w, cols), w),
        ("int8_per_token", lambda o: o.int8_per_token(w), activation.int8_per_token(w), w),
        ("pack2", lambda o: o.pack2(codes), packed, codes),
        ("unpack2", lambda o: o.unpack2(packed, cols), codes, packed),
    ]
    for grid in GRIDS:
        want_codes, want_scales = fake_quant.quantize(w, -1, eps, grid)
        wq = fake_quant.fake_quantize_with_scales(w, want_scales, grid)
        wq_ties = fake_quant.fake_quantize_with_scales(w_ties, scales_O1, grid)
        checks += [
            (
                f"fake_quantize {grid}",
                lambda o, g=grid: o.fake_quantize(w, -1, eps, g, inplace),
                wq,
                w,
            ),
            (f"codes {grid}", lambda o, g=grid: o.quantize(w, -1, eps, g)[0], want_codes, w),
            (f"scales {grid}", lambda o, g=grid: o.quantize(w, -1, eps, g)[1], want_scales, w),
            (
                f"fake_quantize_with_scales {grid}",
                lambda o, g=grid: o.fake_quantize_with_scales(w_ties, scales_O1, g, inplace),
                wq_ties,
                w_ties,
            ),
        ]
    for name, run, want, inputs in checks:
        for who, implementation in operators.items():
            assert_same_bits(
                f"{who} {name} {dtype} [{rows}, {cols}]", run(implementation), want, inputs
            )
    return rows * cols


def test_sets_of_this_processor(module_operators):
    """A sample of the test below that takes a second."""
    for dtype in DTYPES:
        for cols in (1, 2, 31, 64, 65, 100, 130):
            assert_equal_to_the_reference(module_operators, dtype, 27, cols, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["module", "arm"])
def test_ten_million_values(where, request):
    operators = request.getfixturevalue(f"{where}_operators")
    compared = 0
    for dtype in DTYPES:
        for cols in LENGTHS:
            compared += assert_equal_to_the_reference(operators, dtype, 396, cols, seed=2)
    assert compared > 10_000_000


@pytest.mark.slow
def test_sanitizers_on_every_set_threads_and_lists():
    """Arrays of exact size, so an access past an end, also of a thread's share, ends the runner."""
    with use_row("cpu:asan") as row:
        isas = row.runner.call("list_isas", {}, {})[1]["isas"].split(",")
        assert "generic" in isas
        for isa in isas:
            for threads, jobs in ((1, 1), (2, 3), (3, 2)):
                operators = RunnerOperators(row.runner, isa=isa, threads=threads, jobs=jobs)
                for dtype in DTYPES:
                    # The last two are large enough for threads.
                    for rows, cols in (
                        (9, 1),
                        (9, 33),
                        (9, 128),
                        (9, 4099),
                        (900, 130),
                        (19, 8191),
                    ):
                        assert_equal_to_the_reference({isa: operators}, dtype, rows, cols, seed=4)


@pytest.mark.slow
def test_runner_refuses_what_it_does_not_know():
    with use_row("cpu:asan") as row:
        call = row.runner.call
        shape = {"rows": 1, "cols": 4, "group_len": 4}
        w = {"w": torch.ones(1, 4)}
        for op, inputs, keys, message in (
            ("median", {}, {}, "unknown operation median"),
            ("abs_sums", w, {**shape, "dtype": "f64"}, "dtype=f64: unknown"),
            ("abs_sums", w, {**shape, "dtype": "f32", "isa": "sve"}, "isa=sve: not in this"),
            ("abs_sums", w, {**shape, "dtype": "f32", "cols": 5, "group_len": 5}, "of 20 bytes"),
            ("abs_sums", w, {**shape, "dtype": "f32", "group_len": 3}, "does not divide cols"),
            ("quantize", w, {**shape, "dtype": "f32", "eps": "1e-5"}, "not eight hexadecimal"),
        ):
            with pytest.raises(KernelRunnerError, match=message) as caught:
                call(op, inputs, {"sums": (torch.float32, (1, 1))}, **keys)
            assert not caught.value.died


def test_threads_and_lists_do_not_change_results(module_operators):
    """Shares of threads cut tensors anywhere, also a list of mixed types, lengths and sizes."""
    rng = np.random.default_rng(5)
    shapes = [(1, 70_000), (0, 8), (700, 130), (3, 1), (1024, 64), (513, 257), (40, 4096)]
    ws = [normal(rng, DTYPES[i % 3], *shape) for i, shape in enumerate(shapes)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = [ops.fake_quantize(w) for w in ws]
        codes = ops.quantize(ws[-1])[0]
        packed = ops.pack2(codes)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            got = [w.clone() for w in ws]
            ops.foreach_fake_quantize_(got)
            single = [ops.fake_quantize(w) for w in ws]
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(single, want, strict=True))
            assert torch.equal(ops.pack2(codes), packed)
            assert torch.equal(ops.unpack2(packed, 4096), codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_bad_row_of_all_threads_is_found(module_operators, threads):
    codes = torch.zeros(100, 2000, dtype=torch.int8)
    packed = torch.full((100, 512), 0b01010101, dtype=torch.uint8)
    size = (100, 2000, threads)
    native = _cpu.native
    assert native.pack2(codes.data_ptr(), packed.data_ptr(), *size) == -1
    for row in (99, 50, 49):
        codes[row, row] = -2
        packed[row, row] = 0b11
        assert native.unpack2(packed.data_ptr(), codes.clone().data_ptr(), *size) == row
        assert native.pack2(codes.data_ptr(), packed.clone().data_ptr(), *size) == row


def test_the_module_refuses_codes_and_sizes_it_does_not_know(module_operators):
    native = _cpu.native
    for call, message in (
        (lambda: native.abs_sums(0, 0, 3, 0, 4, 1), "unknown element type 3"),
        (lambda: native.fake_quantize([(0, 0, -1, 0, 4)], 0, 1e-5, 1), "unknown element type -1"),
        (lambda: native.fake_quantize([(0, 0, 0, 0, 4)], 5, 1e-5, 1), "unknown grid 5"),
        (lambda: native.quantize(0, 0, 0, 0, -1, 0, 4, 1e-5, 1), "unknown grid -1"),
        (lambda: native.pack2(0, 0, -2, 4, 1), "negative size -2"),
        (lambda: native.int8_per_token(0, 0, 0, 2, -4, 1), "negative size -4"),
        (lambda: native.select_isa("mmx"), "instruction set mmx is not supported here"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_values_hold_what_they_promise():
    """The special cases above do occur; otherwise the comparison would prove little."""
    for dtype in DTYPES:
        w = make_values(dtype, 9 * 40, 64, seed=3).to(torch.float32)
        per_kind = dict(zip((kind.__name__ for kind in KINDS), w.split(40), strict=True))
        s = scales.scales_from_sums(sums.sum_abs_canonical(w, 64), 64, EPS[dtype])
        s = dict(zip(per_kind, s.split(40), strict=True))
        tied = 2 * per_kind["ties_of_the_mean"].abs() == s["ties_of_the_mean"]
        assert tied.any(1).sum() > 5
        x = per_kind["ties_of_the_maximum"].abs()
        for divisor in (1.5, 2.0):
            unit = x.amax(1, keepdim=True) / divisor
            assert all((x == midpoint * unit).any() for midpoint in (0.5, 1.0, 1.5))
        assert not per_kind["one_bad"].isfinite().all(1).any()
        assert per_kind["subnormals"].abs().max() < 3 * torch.finfo(dtype).smallest_normal
        assert (per_kind["zeros"] == 0).all(1).any() and per_kind["zeros"].signbit().any()
        if dtype != torch.float16:
            assert s["near_overflow"].isnan().all()
