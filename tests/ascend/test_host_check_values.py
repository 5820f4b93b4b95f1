"""Single instructions of the host check give the values that numpy and torch give."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.host_check import build_host_check

NUMPY_TYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "i8": np.int8,
    "u8": np.uint8,
    "i16": np.int16,
    "u16": np.uint16,
    "i32": np.int32,
    "u32": np.uint32,
}


class Bench:
    """Runs one instruction on arrays."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self,
        op: str,
        out_type: type,
        out_elements: int,
        a: np.ndarray | None = None,
        b: np.ndarray | None = None,
        **words: object,
    ) -> np.ndarray:
        """Return the instruction's result; AssertionError with the answer if it was refused."""
        for key, array in (("a", a), ("b", b)):
            if array is not None:
                words[key] = self.folder / key
                array.tofile(self.folder / key)
        words["out"] = self.folder / "out"
        words["out_bytes"] = out_elements * np.dtype(out_type).itemsize
        self.ask(op, words)
        return np.fromfile(self.folder / "out", dtype=out_type)

    def ask(self, op: str, words: dict[str, object]) -> None:
        """Send one command; the words of its answer are in `meter`."""
        command = " ".join([op, *(f"{key}={value}" for key, value in words.items())])
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer.startswith("ok"), f"{command}: {answer}"
        self.meter = dict(word.split("=") for word in answer.split()[1:])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Return a running ascend-semantics."""
    runner = Bench(build_host_check("semantics"), tmp_path_factory.mktemp("semantics"))
    yield runner
    assert runner.process.stdin is not None
    runner.process.stdin.close()
    assert runner.process.wait(timeout=10) == 0


def special_floats() -> np.ndarray:
    """Return 4096 float32: random bits, ties and neighbours of half and integers, subnormals."""
    random = np.random.default_rng(5)
    bits = random.integers(0, 2**32, 2048, dtype=np.uint32).view(np.float32)
    halves = random.integers(0, 0x7C00, 256).astype(np.uint16).view(np.float16).astype(np.float64)
    next_halves = np.nextafter(halves.astype(np.float16), np.float16(np.inf)).astype(np.float64)
    ties = ((halves + next_halves) / 2).astype(np.float32)
    ties = np.where(np.isfinite(ties), ties, np.float32(1))
    near = np.concatenate([np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, np.float32(0))])
    integers = np.arange(-256, 256, dtype=np.float32) / 2
    chosen = [0, -0.0, 1e-45, -1e-45, 6e-8, 3e-8, 65504, 65519.996, 65520, 1e30, -1e30, 3.4e38]
    chosen += [np.inf, -np.inf, np.nan, 2**31, -(2**31), 2.0**24 + 2]
    chosen += [32767.5, -32768.5, 127.5, -128.5]
    values = np.concatenate([bits, ties, -ties, near, integers, np.array(chosen, np.float32)])
    return np.resize(values, 4096)


def round_integers(x: np.ndarray, mode: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # random bits hold signalling NaN
        x = x.astype(np.float64)
    away = np.copysign(np.floor(np.abs(x) + 0.5), x)
    rounded = {
        "rint": np.rint(x),
        "none": np.rint(x),
        "floor": np.floor(x),
        "ceil": np.ceil(x),
        "round": away,
        "trunc": np.trunc(x),
    }
    return rounded[mode]


def nearest(x: torch.Tensor, dtype: torch.dtype, mode: str) -> torch.Tensor:
    """Round finite float32 to a 16-bit float by its two neighbours there."""
    near = x.to(dtype)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    exact = near.double() == x.double()
    low = torch.where(near.double() <= x.double(), near, torch.nextafter(near, -infinity))
    high = torch.where(near.double() >= x.double(), near, torch.nextafter(near, infinity))
    toward_zero = torch.where(x > 0, low, high)
    from_zero = torch.where(x > 0, high, low)
    low_gap, high_gap = x.double() - low.double(), high.double() - x.double()
    away = torch.where(low_gap == high_gap, from_zero, near)
    odd = torch.where(low.view(torch.int16) % 2 != 0, low, high)
    results = {"floor": low, "ceil": high, "trunc": toward_zero, "round": away, "odd": odd}
    return torch.where(exact, near, results.get(mode, near))


CAST_MODES = ("rint", "floor", "ceil", "round", "trunc")


@pytest.mark.parametrize(
    ("name", "mode"),
    [("f16", "none"), ("f16", "odd"), *((name, m) for name in ("f16", "bf16") for m in CAST_MODES)],
)
def test_cast_to_16_bits(bench: Bench, name: str, mode: str) -> None:
    dtype = torch.float16 if name == "f16" else torch.bfloat16
    x = special_floats()
    got = bench("Cast", np.int16, 4096, a=x, types=f"f32-{name}", mode=mode, count=4096)
    result = torch.from_numpy(got.copy()).view(dtype)
    inside = np.isfinite(x) & (np.abs(x) <= float(torch.finfo(dtype).max))
    keep = torch.from_numpy(inside)
    expected = nearest(torch.from_numpy(x)[keep], dtype, mode)
    assert torch.equal(result[keep].view(torch.int16), expected.view(torch.int16))
    if mode in ("none", "rint"):  # overflow and NaN as IEEE
        rest = torch.from_numpy(x)[~keep].to(dtype)
        assert torch.equal(result[~keep], rest) or torch.allclose(
            result[~keep].float(), rest.float(), rtol=0, atol=0, equal_nan=True
        )


def test_cast_in_saturation_mode(bench: Bench) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, 1.5, -0.0, 2.0], dtype=np.float32)
    got = bench("Cast", np.float16, 8, a=x, types="f32-f16", mode="rint", count=8, sat=1)
    assert got.tolist() == [65504, -65504, 0, 65504, -65504, 1.5, 0, 2]
    free = bench("Cast", np.float16, 8, a=x, types="f32-f16", mode="rint", count=8)
    assert np.isnan(free[2]) and np.isinf(free[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("mode", CAST_MODES)
@pytest.mark.parametrize("types", ["f32-i32", "f32-i16", "f16-i8", "f16-u8", "f16-i16", "f16-i32"])
def test_cast_to_integers_saturates(bench: Bench, types: str, mode: str) -> None:
    source, target = types.split("-")
    x = special_floats()
    if source == "f16":
        with np.errstate(over="ignore", invalid="ignore"):
            x = x.astype(np.float16)
    limits = np.iinfo(NUMPY_TYPES[target])
    wide = np.array([0.0 if np.isnan(value) else float(value) for value in x])
    rounded = round_integers(wide, mode)
    expected = np.clip(rounded, limits.min, limits.max).astype(NUMPY_TYPES[target])
    got = bench("Cast", NUMPY_TYPES[target], 4096, a=x, types=types, mode=mode, count=4096)
    assert (got == expected).all()


@pytest.mark.parametrize("mode", CAST_MODES)
def test_cast_float_to_float_rounds_to_integers(bench: Bench, mode: str) -> None:
    x = special_floats()
    got = bench("Cast", np.float32, 4096, a=x, types="f32-f32", mode=mode, count=4096)
    np.testing.assert_array_equal(got, round_integers(x, mode).astype(np.float32))


def test_widening_casts_are_exact(bench: Bench) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    for start in range(0, 65536, 16384):
        part = bits[start : start + 16384]
        got = bench("Cast", np.float32, 16384, a=part, types="f16-f32", mode="none", count=16384)
        np.testing.assert_array_equal(got, part.view(np.float16).astype(np.float32))
        got = bench("Cast", np.uint32, 16384, a=part, types="bf16-f32", mode="none", count=16384)
        np.testing.assert_array_equal(got, part.astype(np.uint32) << 16)
    small = np.arange(-128, 128, dtype=np.int8)
    got = bench("Cast", np.float16, 256, a=small, types="i8-f16", mode="none", count=256)
    assert (got == small).all()
    words = np.arange(-32768, 32768, 16, dtype=np.int16)
    got = bench("Cast", np.float32, 4096, a=words, types="i16-f32", mode="none", count=4096)
    assert (got == words).all()
    got = bench("Cast", np.float16, 4096, a=words, types="i16-f16", mode="rint", count=4096)
    assert (got == words.astype(np.float16)).all()


@pytest.mark.parametrize("mode", ["none", "rint", "floor", "ceil", "trunc"])
def test_cast_int32_to_float(bench: Bench, mode: str) -> None:
    x = np.random.default_rng(2).integers(-(2**31), 2**31, 1024).astype(np.int32)
    x[:6] = [0, 2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31)]
    got = bench("Cast", np.float32, 1024, a=x, types="i32-f32", mode=mode, count=1024)
    near = x.astype(np.float32)
    exact, wide = near.astype(np.float64), x.astype(np.float64)
    below = np.where(exact <= wide, near, np.nextafter(near, np.float32(-np.inf)))
    above = np.where(exact >= wide, near, np.nextafter(near, np.float32(np.inf)))
    toward_zero = np.where(wide > 0, below, above)
    expected = {"floor": below, "ceil": above, "trunc": toward_zero}.get(mode, near)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max", "Min"])
@pytest.mark.parametrize("name", ["f32", "f16"])
def test_float_arithmetic_is_ieee(bench: Bench, op: str, name: str) -> None:
    dtype = NUMPY_TYPES[name]
    with np.errstate(all="ignore"):
        a = special_floats().astype(dtype)
        b = special_floats()[::-1].astype(dtype)
        numpy_op = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}
        numpy_op |= {"Max": np.maximum, "Min": np.minimum}
        expected = numpy_op[op](a, b)
    got = bench(op, dtype, 4096, a=a, b=b, type=name, count=4096)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("op", ["Maxs", "Mins"])
def test_extremes_keep_or_drop_nan(bench: Bench, op: str) -> None:
    a = np.array([np.nan, 1, -1, np.inf, -np.inf, 0, 5, np.nan], dtype=np.float32)
    kept = np.maximum(a, np.float32(2)) if op == "Maxs" else np.minimum(a, np.float32(2))
    dropped = np.fmax(a, np.float32(2)) if op == "Maxs" else np.fmin(a, np.float32(2))
    np.testing.assert_array_equal(bench(op, np.float32, 8, a=a, type="f32", count=8, value=2), kept)
    got = bench(op, np.float32, 8, a=a, type="f32", count=8, value=2, nan="drop")
    np.testing.assert_array_equal(got, dropped)


def test_abs_clears_the_sign_bit_only(bench: Bench) -> None:
    a = special_floats()
    got = bench("Abs", np.uint32, 4096, a=a, type="f32", count=4096)
    np.testing.assert_array_equal(got, a.view(np.uint32) & 0x7FFFFFFF)


@pytest.mark.parametrize("name", ["i16", "u16", "i32", "u32"])
@pytest.mark.parametrize("amount", [0, 1, 7, 15, 16])
def test_shift_right_keeps_the_sign_of_signed_words(bench: Bench, name: str, amount: int) -> None:
    dtype = NUMPY_TYPES[name]
    limits = np.iinfo(dtype)
    a = np.random.default_rng(1).integers(limits.min, limits.max, 512, endpoint=True).astype(dtype)
    got = bench("ShiftRight", dtype, 512, a=a, type=name, count=512, value=amount)
    np.testing.assert_array_equal(got, (a.astype(np.int64) >> amount).astype(dtype))


@pytest.mark.parametrize("name", ["u16", "u32"])
def test_shift_left_drops_high_bits(bench: Bench, name: str) -> None:
    dtype = NUMPY_TYPES[name]
    a = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, 512).astype(dtype)
    got = bench("ShiftLeft", dtype, 512, a=a, type=name, count=512, value=5)
    np.testing.assert_array_equal(got, (a.astype(np.int64) << 5).astype(dtype))


@pytest.mark.parametrize("op", ["And", "Or", "Not"])
def test_bitwise(bench: Bench, op: str) -> None:
    random = np.random.default_rng(3)
    a, b = random.integers(-(2**15), 2**15, (2, 512)).astype(np.int16)
    expected = {"And": a & b, "Or": a | b, "Not": ~a}[op]
    got = bench(op, np.int16, 512, a=a, b=b, type="i16", count=512)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["i16", "i32"])
def test_integer_arithmetic(bench: Bench, name: str) -> None:
    dtype = NUMPY_TYPES[name]
    a, b = np.random.default_rng(4).integers(-150, 150, (2, 512)).astype(dtype)
    for op, expected in {"Add": a + b, "Sub": a - b, "Mul": a * b, "Max": np.maximum(a, b)}.items():
        got = bench(op, dtype, 512, a=a, b=b, type=name, count=512)
        np.testing.assert_array_equal(got, expected)


def pair_tree(x: np.ndarray) -> np.ndarray:
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def reduce_input(dtype: type, lanes: int, mask: int) -> tuple[np.ndarray, np.ndarray]:
    """Return data of 5 repeats whose order of addition shows, and the same with masked lanes 0."""
    random = np.random.default_rng(6)
    a = (random.standard_normal((5, lanes)) * 10.0 ** random.integers(-2, 3, (5, lanes))).astype(
        dtype
    )
    masked = a.copy()
    masked[:, mask:] = 0
    return a, masked


@pytest.mark.parametrize("name", ["f32", "f16"])
@pytest.mark.parametrize("part", [1.0, 0.75, 0.1])
def test_whole_reduce_sum_is_a_pair_tree(bench: Bench, name: str, part: float) -> None:
    dtype = NUMPY_TYPES[name]
    lanes = 256 // np.dtype(dtype).itemsize
    mask = int(lanes * part)
    a, masked = reduce_input(dtype, lanes, mask)
    got = bench("WholeReduceSum", dtype, 5, a=a, type=name, mask=mask, repeats=5)
    np.testing.assert_array_equal(got, pair_tree(masked))
    assert int(bench.meter["cycles"]) - int(bench.meter["repeats"]) == 5 * 6  # 7 cycles each
    if part == 1.0:
        sequential = np.add.accumulate(a, axis=1, dtype=dtype)[:, -1]
        assert (sequential != got).any()  # the data can tell the order


def test_block_and_pair_sums(bench: Bench) -> None:
    a, _ = reduce_input(np.float32, 64, 64)
    got = bench("BlockReduceSum", np.float32, 40, a=a, type="f32", mask=64, repeats=5)
    np.testing.assert_array_equal(got, pair_tree(a.reshape(40, 8)))
    got = bench("PairReduceSum", np.float32, 160, a=a, type="f32", mask=64, repeats=5)
    np.testing.assert_array_equal(got, (a[:, 0::2] + a[:, 1::2]).ravel())
    part = bench("BlockReduceSum", np.float32, 8, a=a, type="f32", mask=20, repeats=1, clear=1)
    expected = np.zeros(8, np.float32)
    expected[:2] = pair_tree(a[0, :16].reshape(2, 8))
    expected[2] = pair_tree(np.append(a[0, 16:20], np.zeros(4, np.float32)))
    np.testing.assert_array_equal(part, expected)  # blocks wholly masked stay as they were


def test_block_sums_twice_are_the_whole_sum(bench: Bench) -> None:
    a, _ = reduce_input(np.float32, 64, 64)
    once = bench("BlockReduceSum", np.float32, 40, a=a, type="f32", mask=64, repeats=5)
    twice = bench("BlockReduceSum", np.float32, 5, a=once, type="f32", mask=40, repeats=1)
    whole = bench("WholeReduceSum", np.float32, 5, a=a, type="f32", mask=64, repeats=5)
    np.testing.assert_array_equal(twice, whole)


def test_accumulation_adds_in_order(bench: Bench) -> None:
    a, _ = reduce_input(np.float32, 64, 64)
    got = bench("accumulate", np.float32, 64, a=a, type="f32", mask=64, repeats=5, clear=1)
    expected = np.zeros(64, np.float32)
    for row in a:
        expected = row + expected
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["f32", "u16"])
def test_brcb_fills_one_block_per_element(bench: Bench, name: str) -> None:
    dtype = NUMPY_TYPES[name]
    per_block = 32 // np.dtype(dtype).itemsize
    a = np.arange(1, 25).astype(dtype)
    got = bench("Brcb", dtype, 24 * per_block, a=a, type=name, repeats=3)
    np.testing.assert_array_equal(got, np.repeat(a, per_block))


def test_block_stride_0_broadcasts_one_block(bench: Bench) -> None:
    a = np.random.default_rng(7).standard_normal((3, 64)).astype(np.float32)
    scales = np.array([2, 3, 5], dtype=np.float32)
    got = bench(
        "broadcast", np.float32, 192, a=a, b=np.repeat(scales, 8), type="f32", mask=64, repeats=3
    )
    np.testing.assert_array_equal(got, (a * scales[:, None]).ravel())


@pytest.mark.parametrize("mode", ["lt", "gt", "eq", "le", "ge", "ne"])
@pytest.mark.parametrize("with_scalar", [False, True])
def test_compare_packs_bits_from_the_lowest(bench: Bench, mode: str, with_scalar: bool) -> None:
    random = np.random.default_rng(8)
    a, b = random.integers(-2, 3, (2, 256)).astype(np.float32)
    a[5], b[9] = np.nan, np.nan
    right = np.full(256, 1, np.float32) if with_scalar else b
    numpy_op = {"lt": np.less, "gt": np.greater, "eq": np.equal}
    numpy_op |= {"le": np.less_equal, "ge": np.greater_equal, "ne": np.not_equal}
    extra = {"value": 1} if with_scalar else {}
    got = bench("Compare", np.uint8, 32, a=a, b=b, type="f32", mode=mode, count=256, **extra)
    np.testing.assert_array_equal(got, np.packbits(numpy_op[mode](a, right), bitorder="little"))


def test_select_takes_the_source_where_the_bit_is_1(bench: Bench) -> None:
    a = np.random.default_rng(9).standard_normal(200).astype(np.float32)
    take = a > 0.3
    bits = np.packbits(np.resize(take, 256), bitorder="little")
    got = bench("Select", np.float32, 200, a=a, b=bits, type="f32", count=200, value=7)
    np.testing.assert_array_equal(got, np.where(take, a, np.float32(7)))


@pytest.mark.parametrize(("left", "right"), [(0, 3), (2, 1), (5, 0)])
def test_copy_pads_blocks_to_32_bytes(bench: Bench, left: int, right: int) -> None:
    """Three blocks of 10 words, 2 words apart in global memory, one free block apart inside."""
    a = np.arange(100, 136, dtype=np.int16)
    got = bench(
        "DataCopyPad",
        np.int16,
        16 * 5,
        a=a,
        blocks=3,
        length=20,
        gap=4,
        ub_gap=1,
        left=left,
        right=right,
        value=-7,
        clear=1,
    )
    expected = np.zeros((5, 16), np.int16)
    for block in range(3):
        line = np.full(16, -7, np.int16)
        line[left : left + 10] = a[12 * block : 12 * block + 10]
        expected[2 * block] = line
    np.testing.assert_array_equal(got.reshape(5, 16), expected)


def test_the_meter_counts_bytes_and_repeats(bench: Bench) -> None:
    words = np.ones(1000, np.int16)
    bench("Not", np.int16, 1000, a=words, type="i16", count=1000)
    assert bench.meter["repeats"] == "8"  # 128 words of 16 bits a repeat
    assert (bench.meter["read"], bench.meter["written"]) == ("2000", "2000")
    floats = np.ones(1000, np.float32)
    bench("Adds", np.float32, 1000, a=floats, type="f32", count=1000, value=1)
    assert (bench.meter["repeats"], bench.meter["cycles"]) == ("16", "16")  # 64 lanes a repeat
    assert (bench.meter["instructions"], bench.meter["barriers"]) == ("1", "2")


@pytest.mark.parametrize("cores", [1, 3, 40, 48])
def test_cores_run_once_each_in_shuffled_order(bench: Bench, cores: int) -> None:
    orders = []
    for seed in range(4):
        bench.ask("visits", {"cores": cores, "seed": seed})
        orders.append([int(turn) for turn in bench.meter["turns"].split(",")[:-1]])
        assert sorted(orders[-1]) == list(range(cores))
    if cores > 1:
        assert any(order != sorted(order) for order in orders)
        assert len({tuple(order) for order in orders}) > 1
