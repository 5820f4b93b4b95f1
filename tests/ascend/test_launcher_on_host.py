"""The launchers and the kernels together, without an NPU.

The launchers and their Python module are compiled as they are. Behind them stand a task queue that
runs when the test says so, in place of torch_npu's, and the host check, in place of the device.
Operators are called through the dispatcher's PrivateUse1 kernels with tensors on the CPU, so the
whole way is run: Python checks, launcher, tiling, kernel. The values expected are those of
`tests/ops/numpy_ternary.py`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import numpy_ternary as expected
from helpers.host_check import HOST_CHECK, ROOT, require_tools

from megatron_bitcpm import ops
from megatron_bitcpm.ops import _npu

pytestmark = pytest.mark.slow
BUILD = ROOT / "build/checks/launcher-on-host"
DOUBLES = ROOT / "tests/ascend/launcher_on_host"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build_module() -> Path:
    """Compile the module; about 25 s with two cores, later runs only what has changed."""
    require_tools("g++")
    BUILD.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    ascend = ROOT / "csrc/ascend"
    headers = [*ascend.rglob("*.h"), *HOST_CHECK.rglob("*.h"), *DOUBLES.iterdir()]
    newest = max(path.stat().st_mtime for path in headers)
    plain = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
    host_check = [f"-I{HOST_CHECK}/include"]
    with_torch = [
        f"-I{ascend}",
        "-fvisibility=hidden",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-isystem",
        f"{torch_folder}/include",
        "-isystem",
        f"{torch_folder}/include/torch/csrc/api/include",
        "-isystem",
        sysconfig.get_path("include"),
    ]
    kernels = max(path.stat().st_mtime for path in ascend.glob("*/op_kernel/*"))
    jobs = [(DOUBLES / "kernels.cpp", host_check, max(newest, kernels))]
    launchers = [*ascend.glob("*/op_host/*.cpp"), ascend / "module.cpp", DOUBLES / "queue.cpp"]
    jobs += [(path, with_torch, max(newest, path.stat().st_mtime)) for path in launchers]

    def compile_one(job: tuple[Path, list[str], float]) -> Path:
        source, flags, changed = job
        # Objects of another torch would be linked without a complaint.
        name = str(source.relative_to(ROOT)).replace("/", "_")
        target = BUILD / f"{name}.{torch.__version__}.o"
        if not target.exists() or target.stat().st_mtime < changed:
            subprocess.run(["g++", *plain, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    module = BUILD / f"_npu.{torch.__version__}.so"
    libraries = [f"-L{torch_folder}/lib", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(["g++", "-shared", *objects, *libraries, "-o", module], check=True)
    return module


@pytest.fixture(scope="module")
def built() -> tuple[Any, ctypes.CDLL]:
    """Return the Python module, and the same file for its test functions."""
    path = build_module()
    spec = importlib.util.spec_from_file_location("megatron_bitcpm._npu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    library.run_tasks.restype = ctypes.c_char_p
    return module, library


@pytest.fixture
def library(
    built: tuple[Any, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ctypes.CDLL]:
    """Put the module in place, on a device of 48 cores."""
    module, library = built
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    monkeypatch.setitem(sys.modules, "megatron_bitcpm._npu", module)
    for name, value in (("native", None), ("load_error", None), ("device", None)):
        monkeypatch.setattr(_npu, name, value)
    monkeypatch.setattr(_npu, "_tried", False)
    library.set_device(48, 196608)
    ops.use_backend("native", "npu")
    yield library
    library.run_tasks()
    ops.use_backend("auto")


def call(name: str, *args: Any) -> Any:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    return getattr(torch.ops.bitcpm, name).default.redispatch(key, *args)


def run_tasks(library: ctypes.CDLL) -> list[str]:
    answer = library.run_tasks().decode()
    assert not answer.startswith("error"), answer
    return [name.removeprefix("bitcpm_") for name in answer.split()]


def make_weight(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    w[0] = 0
    if rows > 2:
        w[2, cols // 2] = float("nan")
    return w.to(dtype)


def quantize_with_numpy(
    w: torch.Tensor, group_len: int, scales: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the bits of wq, the codes, the bits of the scales and of the sums."""
    x = w.float().numpy()
    sums = expected.abs_sums(x, group_len)
    if scales is None:
        scales = expected.compute_scales(x, group_len, 1e-5, "ternary")
    codes = expected.codes_from_scales(x, scales)
    wq = expected.level_bits(codes, scales, w.dtype)
    # Under scales that were handed in a weight that is not finite shows alone.
    wq = np.where(np.isfinite(x), wq, expected.NAN_BITS[w.dtype])
    return wq, codes, expected.float32_bits(scales), expected.float32_bits(sums)


def assert_bits(got: torch.Tensor, bits: np.ndarray) -> None:
    assert np.array_equal(expected.bits_of(got), bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols", "group_size"), [(5, 256, 64), (50, 96, 8), (7, 2048, -1)])
def test_functional_operators(
    library: ctypes.CDLL, dtype: torch.dtype, rows: int, cols: int, group_size: int
) -> None:
    w = make_weight(rows, cols, dtype)
    group_len = cols if group_size == -1 else group_size
    wq, codes, scales, sums = quantize_with_numpy(w, group_len)
    got_wq = call("fake_quantize", w, group_size)
    got_codes, got_scales = call("quantize", w, group_size)
    got_sums = call("abs_sums", w, group_size)
    given = torch.rand(rows, cols // group_len) + 0.1
    got_given = call("fake_quantize_with_scales", w, given)
    got_packed = call("pack2", torch.from_numpy(codes))
    names = ["fake_quantize", "fake_quantize", "abs_sums", "fake_quantize_with_scales", "pack2"]
    assert run_tasks(library) == names
    assert got_wq.dtype == got_given.dtype == dtype
    assert_bits(got_wq, wq)
    assert got_codes.dtype == torch.int8 and np.array_equal(got_codes.numpy(), codes)
    assert got_scales.dtype == got_sums.dtype == torch.float32
    assert_bits(got_scales, scales)
    assert_bits(got_sums, sums)
    assert_bits(got_given, quantize_with_numpy(w, group_len, given.numpy())[0])
    assert np.array_equal(got_packed.numpy(), expected.pack2(codes))


@pytest.mark.parametrize("cores", [1, 3, 40])
def test_a_list_is_one_task_that_outlives_its_inputs(library: ctypes.CDLL, cores: int) -> None:
    library.set_device(cores, 196608)
    shapes = {(6, 256): torch.float32, (3, 1024): torch.bfloat16, (1, 64): torch.float16}
    ws = [make_weight(*shape, dtype, seed=len(shape)) for shape, dtype in shapes.items()]
    ws.append(torch.empty(0, 64))
    before = [w.clone() for w in ws]
    call("foreach_fake_quantize_", ws, -1)
    for w, old in zip(ws, before, strict=True):
        assert w.numel() == 0 or np.array_equal(expected.bits_of(w), expected.bits_of(old))
    assert run_tasks(library) == ["fake_quantize"]
    for w, old in zip(ws[:3], before[:3], strict=True):
        assert_bits(w, quantize_with_numpy(old, old.shape[1])[0])

    ws = [b.clone() for b in before[:3]]
    scales = [torch.full((len(w), 2), 0.5) for w in ws]
    call("foreach_fake_quantize_with_scales_", ws, scales)
    # The scales are gone, and their memory is used again, before the kernels run.
    del scales
    gc.collect()
    filler = [torch.full((64, 2), 1e9) for _ in range(200)]
    assert run_tasks(library) == ["fake_quantize_with_scales"]
    del filler
    for w, old in zip(ws, before[:3], strict=True):
        given = np.full((len(old), 2), 0.5, np.float32)
        assert_bits(w, quantize_with_numpy(old, old.shape[1] // 2, given)[0])


def test_outputs_of_a_strided_weight(library: ctypes.CDLL) -> None:
    full = make_weight(8, 128, torch.bfloat16)
    bits = quantize_with_numpy(full[1::2].contiguous(), 32)[0]
    got = call("fake_quantize", full[1::2], 32)
    run_tasks(library)
    assert_bits(got, bits)


def test_empty_tensors_queue_nothing(library: ctypes.CDLL) -> None:
    assert call("fake_quantize", torch.empty(0, 64), 32).shape == (0, 64)
    assert call("quantize", torch.empty(3, 0))[1].shape == (3, 0)
    assert call("abs_sums", torch.empty(0, 64), 32).shape == (0, 2)
    assert call("pack2", torch.empty(2, 0, dtype=torch.int8)).shape == (2, 0)
    call("foreach_fake_quantize_", [torch.empty(0, 8)], 8)
    call("foreach_fake_quantize_", [])
    assert run_tasks(library) == []


def test_device_is_reported(library: ctypes.CDLL) -> None:
    assert ops.backend_report()["npu"]["device"] == {"vector_cores": 48, "ub_bytes": 196608}


def test_launchers_refuse_what_python_should_have(built: tuple[Any, ctypes.CDLL]) -> None:
    module, library = built
    w = torch.zeros(4, 8)
    for message, function, args in (
        ("must have two dimensions", module.fake_quantize, (w[0], 8, 1e-5)),
        ("must be contiguous", module.fake_quantize, (w.t(), 4, 1e-5)),
        ("must be float32, bfloat16 or float16", module.abs_sums, (w.double(), 8)),
        ("groups of 3 do not divide rows of 8", module.quantize, (w, 3, 1e-5)),
        ("groups of 0 do not divide", module.abs_sums, (w, 0)),
        ("does not fit", module.fake_quantize_with_scales, (w, torch.ones(4, 3))),
        ("scales.dtype must be float32", module.fake_quantize_with_scales, (w, w.half())),
        ("codes.dtype must be int8", module.pack2, (w,)),
        ("one group length per tensor", module.fake_quantize_list, ([w], [], 1e-5)),
        ("must be on an NPU", module.fake_quantize, (w.to("meta"), 8, 1e-5)),
    ):
        with pytest.raises(RuntimeError, match=message):
            function(*args)
    # The second half is a view whose offset alone makes an address.
    without_memory = torch.zeros(8, 8)
    halves = (without_memory[:4], without_memory[4:])
    without_memory.untyped_storage().resize_(0)
    for half in halves:
        with pytest.raises(RuntimeError, match="w has no memory"):
            module.fake_quantize(half, 8, 1e-5)
        with pytest.raises(RuntimeError, match="scales has no memory"):
            module.fake_quantize_with_scales(torch.zeros(4, 8), half)
    library.set_device(0, 196608)
    with pytest.raises(RuntimeError, match="no vector cores"):
        module.fake_quantize(w, 8, 1e-5)
    assert library.run_tasks() == b""
