"""The operators as torch sees them: schema, fakes, gradients, refusals, backends."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from megatron_bitcpm import ops
from megatron_bitcpm.errors import BackendError, BitcpmError
from megatron_bitcpm.ops import _cpu

needs_native = pytest.mark.skipif(_cpu.native is None, reason="compiled module not built")


def random_weight(rows=8, cols=64, dtype=torch.float32):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("fake_quantize", (16, 1e-5)),
        ("quantize", (16, 1e-5)),
        ("abs_sums", (16,)),
        ("fake_quantize_with_scales", (torch.full((8, 4), 0.5),)),
        ("fake_quantize_", (16, 1e-5)),
        ("fake_quantize_with_scales_", (torch.full((8, 4), 0.5),)),
    ],
)
@pytest.mark.parametrize("which", ["reference", "auto"])
def test_opcheck(name, args, which):
    ops.use_backend(which)
    try:
        w = random_weight().requires_grad_(not name.endswith("_"))
        torch.library.opcheck(getattr(torch.ops.bitcpm, name).default, (w, *args))
    finally:
        ops.use_backend("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_identity_and_values_are_on_the_grid(backend, dtype):
    grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    for function in (
        lambda w: ops.fake_quantize(w, 16),
        lambda w: ops.fake_quantize_with_scales(w, ops.quantize(w, 16)[1]),
    ):
        w = random_weight(dtype=dtype).requires_grad_()
        wq = function(w)
        wq.backward(grad)
        assert torch.equal(w.grad, grad)
        for group in wq.detach().reshape(-1, 16):
            positive = group.abs().unique()
            assert len(positive[positive > 0]) == 1


def test_codes_scales_and_sums_carry_no_gradient(backend):
    w = random_weight().requires_grad_()
    codes, scales = ops.quantize(w)
    assert not (codes.requires_grad or scales.requires_grad or ops.abs_sums(w).requires_grad)
    scales = scales.clone().requires_grad_()
    ops.fake_quantize_with_scales(w, scales).sum().backward()
    assert scales.grad is None


def test_fake_tensors_have_the_right_shapes():
    w = torch.empty(6, 64, dtype=torch.bfloat16, device="meta").t().contiguous().t()
    assert (ops.fake_quantize(w).shape, ops.fake_quantize(w).dtype) == (w.shape, w.dtype)
    assert ops.fake_quantize(w).is_contiguous()
    codes, scales = ops.quantize(w, 16)
    assert (codes.shape, codes.dtype) == ((6, 64), torch.int8)
    assert (scales.shape, scales.dtype) == ((6, 4), torch.float32)
    assert ops.abs_sums(w).shape == (6, 1)
    with pytest.raises(RuntimeError, match=r"w.shape=\[3\]: must be \[out, in\]"):
        ops.fake_quantize(torch.empty(3, device="meta"))


def test_in_place_writes_through_any_strides(backend):
    for w in (random_weight(), random_weight(64, 8).t(), random_weight(8, 128)[:, ::2]):
        want, version = ops.fake_quantize(w, 16), w._version
        scales = ops.quantize(w, 16)[1]
        given = ops.fake_quantize_with_scales(w, scales)
        other = w.clone(memory_format=torch.preserve_format)
        assert ops.fake_quantize_(w, 16) is w
        assert torch.equal(w, want) and w._version > version
        version = other._version
        assert ops.fake_quantize_with_scales_(other, scales) is other
        assert torch.equal(other, given) and other._version > version


def test_in_place_on_a_parameter(backend):
    w = random_weight().requires_grad_()
    message = r"w.requires_grad=True: autograd cannot record this. Call it under torch.no_grad\(\)."
    with pytest.raises(BitcpmError, match=message):
        ops.fake_quantize_(w)
    want = ops.fake_quantize(w.detach())
    with torch.no_grad():
        ops.fake_quantize_(w)
    assert w.is_leaf and torch.equal(w, want)


def test_autograd_notices_an_in_place_change(backend):
    w = random_weight().requires_grad_()
    loss = (w * w).sum()
    with torch.no_grad():
        ops.fake_quantize_(w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_non_contiguous_inputs_equal_their_copies(backend):
    w = random_weight(64, 96).t()[::2]
    assert torch.equal(ops.fake_quantize(w, 32), ops.fake_quantize(w.contiguous(), 32))
    assert torch.equal(ops.quantize(w, 32)[0], ops.quantize(w.contiguous(), 32)[0])
    assert torch.equal(ops.abs_sums(w, 32), ops.abs_sums(w.contiguous(), 32))
    per_tensor = torch.full((1, 1), 0.5).expand(48, 1)
    wq = ops.fake_quantize_with_scales(w, per_tensor)
    assert torch.equal(wq, ops.fake_quantize_with_scales(w.contiguous(), per_tensor.contiguous()))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_empty_weights(backend, shape):
    w = torch.empty(shape)
    num_groups = 1 if shape[1] else 0
    assert ops.fake_quantize(w).shape == shape
    codes, scales = ops.quantize(w)
    assert codes.shape == shape and scales.shape == (shape[0], num_groups)
    assert ops.abs_sums(w).shape == (shape[0], num_groups)
    assert ops.fake_quantize_(w) is w
    assert ops.fake_quantize_with_scales(w, scales).shape == shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.fake_quantize(torch.ones(2, 4544), 128),
            "group_size=128: in_features 4544 is not a multiple. "
            "Use 71 or 142, or -1 for the whole row.",
        ),
        (
            lambda: ops.quantize(torch.ones(2, 4), 0),
            "group_size=0: must be at least 1, or -1 for the whole row. Use 64 or -1.",
        ),
        (
            lambda: ops.abs_sums(torch.ones(4)),
            "w.shape=[4]: must be [out, in]. Reshape the weight to two dimensions.",
        ),
        (
            lambda: ops.fake_quantize_(torch.ones(2, 4, dtype=torch.float64)),
            "w.dtype=torch.float64: must be float32, bfloat16 or float16. "
            "Convert the weight first.",
        ),
        (
            lambda: ops.fake_quantize(torch.ones(2, 4), eps=0.0),
            "eps=0.0: the smallest scale must be a positive normal float32. Use 1e-5.",
        ),
        (
            lambda: ops.fake_quantize_with_scales(torch.ones(2, 4), torch.ones(2, 3)),
            "scales.shape=[2, 3]: must be [2, G] with G a divisor of 4, the inputs of w. "
            "Pass one scale per group, e.g. expand a scale per row to [out, 1].",
        ),
        (
            lambda: ops.fake_quantize_with_scales_(torch.ones(2, 4), torch.ones(1, 1)),
            "scales.shape=[1, 1]: must be [2, G] with G a divisor of 4, the inputs of w. "
            "Pass one scale per group, e.g. expand a scale per row to [out, 1].",
        ),
        (
            lambda: ops.fake_quantize_with_scales(torch.ones(2, 4), torch.ones(2, 1).double()),
            "scales.dtype=torch.float64: must be float32. Take them from scales_from_sums.",
        ),
    ],
)
def test_refusals_are_one_line(backend, call, message):
    with pytest.raises(BitcpmError) as caught:
        call()
    assert str(caught.value) == message


def test_unknown_backend_and_instruction_set_are_refused():
    for name in ("gpu", "cpu"):
        with pytest.raises(BackendError, match=rf"quant.backend={name}: is no backend. Use auto"):
            ops.use_backend(name)
    if _cpu.native is not None:
        with pytest.raises(BackendError, match="BITCPM_CPU_ISA=sse9: this processor and build"):
            _cpu.select_isa("sse9")


@pytest.mark.parametrize("device_type", ["npu", "cuda"])
def test_native_is_refused_where_no_kernel_is_built(device_type):
    message = f"quant.backend=native: there are no compiled operators for {device_type}. Use auto."
    with pytest.raises(BackendError) as caught:
        ops.use_backend("native", device_type)
    assert str(caught.value) == message
    for name in ("reference", "auto"):
        ops.use_backend(name, device_type)
        assert ops.backend_report()["requested"] == name


@needs_native
def test_backend_report_names_what_runs(monkeypatch):
    assert ops.backend_report()["cpu"]["backend"] == "native"
    assert ops.backend_report()["cpu"]["isa"] in _cpu.native.supported_isas()
    ops.use_backend("reference")
    # The compiled module must not be touched now.
    monkeypatch.setattr(_cpu, "native", object())
    report = ops.backend_report()
    assert report["cpu"]["backend"] == "reference" and report["requested"] == "reference"
    w = random_weight()
    assert torch.equal(ops.fake_quantize_(w.clone()), ops.fake_quantize(w))
    ops.quantize(w), ops.abs_sums(w), ops.fake_quantize_with_scales(w, torch.ones(8, 1))
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
            assert torch.equal(ops.quantize(w, 64)[1], _cpu.quantize(w, 64, 1e-5)[1])
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_huge_page_hint_changes_no_value(monkeypatch):
    w = random_weight(1024, 4096)
    monkeypatch.setattr(_cpu, "huge_page_min_bytes", None)
    want = ops.fake_quantize(w)
    monkeypatch.setattr(_cpu, "huge_page_min_bytes", 1)
    assert torch.equal(ops.fake_quantize(w), want)


FALLBACK = """
import sys
sys.modules["megatron_bitcpm._cpu"] = None
import torch
from megatron_bitcpm import ops
report = ops.backend_report()
assert report["cpu"]["backend"] == "reference", report
assert "_cpu" in report["cpu"]["load_error"], report
w = torch.randn(4, 64)
codes, scales = ops.quantize(w)
assert torch.equal(ops.fake_quantize(w), codes * scales)
assert torch.equal(ops.fake_quantize_(w.clone()), codes * scales)
loaded = {"megatron", "transformers", "torch_npu"} & set(sys.modules)
assert not loaded, loaded
ops.use_backend("auto")
ops.use_backend("reference")
try:
    ops.use_backend("native")
except ValueError as error:
    print(error)
"""


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


def test_without_the_compiled_module_the_reference_runs_and_says_so_once():
    done = run_python(FALLBACK)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no compiled CPU operators") == 1
    assert done.stdout.startswith("quant.backend=native: the compiled CPU operators did not load (")
    assert "_cpu" in done.stdout and done.stdout.strip().endswith("or use auto.")


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
