"""Which implementation of the operators runs: choice, report, broken compiled modules."""

import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from helpers.operator_cases import GRIDS, random_weight

from megatron_bitcpm import ops
from megatron_bitcpm.errors import BackendError
from megatron_bitcpm.ops import _cpu
from megatron_bitcpm.ops._schema import SCHEMAS

needs_native = pytest.mark.skipif(_cpu.native is None, reason="compiled module not built")


def test_unknown_backend_and_instruction_set_are_refused():
    for name in ("gpu", "cpu"):
        with pytest.raises(
            BackendError, match=rf"quant.backend={name}: is not a backend. Use auto"
        ):
            ops.use_backend(name)
    if _cpu.native is not None:
        with pytest.raises(BackendError) as caught:
            _cpu.select_isa("sse9")
        choices = " or ".join(_cpu.native.supported_isas())
        assert str(caught.value) == (
            "BITCPM_CPU_ISA=sse9: this processor and build have no such kernels. "
            f"Use auto or {choices}."
        )


@pytest.mark.parametrize(
    ("device_type", "message"),
    [
        ("cuda", "there are no compiled operators for cuda. Use auto."),
        (
            "npu",
            "torch_npu is not imported in this process. See docs/ascend.md, or use auto.",
        ),
    ],
)
def test_native_is_refused_where_no_kernel_is_built(device_type, message):
    if device_type in sys.modules or f"torch_{device_type}" in sys.modules:
        pytest.skip("this machine has such a device")
    with pytest.raises(BackendError) as caught:
        ops.use_backend("native", device_type)
    assert str(caught.value) == f"quant.backend=native: {message}"
    for name in ("reference", "auto"):
        ops.use_backend(name, device_type)
        assert ops.backend_report()["requested"] == name
        assert ops.backend_report()["npu"]["backend"] == "reference"


@needs_native
def test_backend_report_names_what_runs(monkeypatch):
    assert ops.backend_report()["cpu"]["backend"] == "native"
    assert ops.backend_report()["cpu"]["isa"] in _cpu.native.supported_isas()
    assert ops.backend_report()["cpu"]["isas"] == _cpu.native.supported_isas()
    assert set(ops.backend_report()["cpu"]["ops"]) == set(SCHEMAS)
    assert ops.backend_report()["cpu"]["grids"] == GRIDS
    ops.use_backend("reference")
    # The compiled module must not be touched now.
    monkeypatch.setattr(_cpu, "native", object())
    report = ops.backend_report()
    assert report["cpu"]["backend"] == "reference" and report["requested"] == "reference"
    w = random_weight()
    assert torch.equal(ops.fake_quantize_(w.clone()), ops.fake_quantize(w))
    codes = ops.quantize(w)[0]
    ops.abs_sums(w), ops.fake_quantize_with_scales(w, torch.ones(8, 1)), ops.int8_per_token(w)
    ops.fake_quantize_with_scales_(w, torch.ones(8, 1)), ops.unpack2(ops.pack2(codes), 64)
    ops.foreach_fake_quantize_([w]), ops.foreach_fake_quantize_with_scales_([w], [torch.ones(8, 1)])
    ops.use_backend("auto")


@needs_native
def test_compiled_kernels_run_and_thread_count_changes_nothing():
    w = random_weight(64, 4096)
    want = ops.fake_quantize(w)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.fake_quantize(w), want)
            assert torch.equal(ops.quantize(w, 64)[1], _cpu.OPERATORS.quantize(w, 64, 1e-5)[1])
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_a_grid_that_is_not_compiled_runs_the_reference(monkeypatch):
    w = random_weight()
    want = ops.fake_quantize(w, grid="five")
    monkeypatch.delitem(_cpu._GRID_CODES, "five")
    assert torch.equal(ops.fake_quantize(w, grid="five"), want)
    assert torch.equal(ops.fake_quantize_(w.clone(), grid="five"), want)
    assert "five" not in ops.backend_report()["cpu"]["grids"]
    with pytest.raises(BackendError, match=r"no compiled operators for quant.grid five"):
        ops.use_backend("native", grid="five")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


def stand_in(**changes) -> types.ModuleType:
    """A compiled module of this version that was never built."""
    module = types.ModuleType("megatron_bitcpm._cpu")
    names = {"abi": _cpu._ABI, "supported_isas": lambda: ["fast"], "select_isa": lambda name: name}
    module.__dict__.update({**names, **changes})
    return module


def raise_text(*args):
    raise RuntimeError("no cpuid\nhere")


@pytest.fixture
def unloaded(monkeypatch):
    """The state before `_cpu.register`; nothing is registered with torch a second time."""
    for name in ("native", "load_error", "isa"):
        monkeypatch.setattr(_cpu, name, None)
    registered = []
    library = types.SimpleNamespace(impl=lambda name, kernel, key: registered.append((name, key)))
    monkeypatch.setattr(_cpu, "LIBRARY", library)
    return registered


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            stand_in(abi=_cpu._ABI + 1),
            f"built from another version (abi {_cpu._ABI + 1}, not {_cpu._ABI}): reinstall",
        ),
        (
            types.ModuleType("megatron_bitcpm._cpu"),
            f"built from another version (abi None, not {_cpu._ABI}): reinstall",
        ),
        (stand_in(supported_isas=raise_text), "RuntimeError: no cpuid here"),
        (stand_in(select_isa=raise_text), "RuntimeError: no cpuid here"),
        (
            None,
            "ModuleNotFoundError: import of megatron_bitcpm._cpu halted; None in sys.modules",
        ),
    ],
    ids=["newer", "older", "no list of sets", "no choice of a set", "absent"],
)
def test_a_broken_compiled_module_is_one_line_and_the_reference(
    unloaded, monkeypatch, module, reason
):
    monkeypatch.setitem(sys.modules, "megatron_bitcpm._cpu", module)
    _cpu.register("")
    assert (_cpu.native, _cpu.load_error, unloaded) == (None, reason, [])
    report = ops.backend_report()["cpu"]
    assert report["backend"] == "reference" and report["load_error"] == reason
    with pytest.raises(BackendError) as caught:
        ops.use_backend("native")
    assert str(caught.value) == (
        f"quant.backend=native: the compiled CPU operators did not load ({reason}). "
        "Reinstall with a C++ compiler, or use auto."
    )


def test_a_sound_module_is_registered_and_an_unknown_set_is_an_error(unloaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_bitcpm._cpu", stand_in())
    with pytest.raises(BackendError) as caught:
        _cpu.register("sse9")
    assert str(caught.value) == (
        "BITCPM_CPU_ISA=sse9: this processor and build have no such kernels. Use auto or fast."
    )
    assert unloaded == []
    _cpu.register("fast")
    assert _cpu.isa == "fast" and _cpu.load_error is None
    assert unloaded == [(name, "CPU") for name in SCHEMAS]


@needs_native
def test_the_compiled_module_is_of_this_version():
    assert _cpu.native.abi == _cpu._ABI


FALLBACK = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "megatron_bitcpm._cpu":
            raise OSError("bad ELF header\\nline two")
sys.meta_path.insert(0, Finder())
import torch
from megatron_bitcpm import ops
report = ops.backend_report()
assert report["cpu"]["backend"] == "reference", report
w = torch.randn(4, 64)
codes, scales = ops.quantize(w)
assert torch.equal(ops.fake_quantize(w), codes * scales)
assert torch.equal(ops.fake_quantize_(w.clone()), codes * scales)
assert ops.quantize(torch.ones(2, 8), grid="five")[0].tolist() == [[2] * 8] * 2
loaded = {"megatron", "transformers", "torch_npu"} & set(sys.modules)
assert not loaded, loaded
print("done")
"""


def test_without_the_compiled_module_the_reference_runs_and_says_so_once():
    done = run_python(FALLBACK)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == (
        "no compiled CPU operators (OSError: bad ELF header line two): using the pure-torch "
        "reference, slower, equal bits"
    )
    assert done.stdout.strip() == "done"


@pytest.mark.slow
@needs_native
def test_environment_chooses_the_instruction_set():
    code = "from megatron_bitcpm import ops; print(ops.backend_report()['cpu']['isa'])"
    assert run_python(code, BITCPM_CPU_ISA="generic").stdout.strip() == "generic"


@needs_native
def test_nothing_is_logged_when_the_module_is_there(caplog):
    with caplog.at_level(logging.WARNING):
        ops.fake_quantize(random_weight())
    assert not caplog.records
