"""The operators on NPUs, as far as they can be exercised without one.

The compiled module is a stand-in that writes down its calls. Tensors are on the CPU and go to the
PrivateUse1 kernels by the dispatcher's own key, as tensors of an NPU would.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_bitcpm
from megatron_bitcpm import ops
from megatron_bitcpm.errors import BackendError, BitcpmError
from megatron_bitcpm.ops import _npu

MARK = 7.0  # what the stand-in writes; no weight below quantises to it


class NativeModule(types.ModuleType):
    """Stands in for megatron_bitcpm._npu: checks what launchers check, marks what it writes."""

    def __init__(self) -> None:
        super().__init__("megatron_bitcpm._npu")
        self.calls: list[tuple[Any, ...]] = []
        self.private: list[torch.Tensor] = []  # tensors that are in a private format

    def describe_device(self) -> dict[str, int]:
        return {"vector_cores": 48, "ub_bytes": 196608}

    def has_plain_format(self, tensor: torch.Tensor) -> bool:
        return not any(tensor is private for private in self.private)

    def _take(self, name: str, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            assert tensor.dim() == 2 and tensor.is_contiguous()
        self.calls.append((name, *(tuple(tensor.shape) for tensor in tensors)))

    def fake_quantize(self, w: torch.Tensor, group_len: int, eps: float) -> torch.Tensor:
        assert group_len >= 1
        self._take(f"fake_quantize/{group_len}/{eps:g}", w)
        return torch.full_like(w, MARK)

    def quantize(
        self, w: torch.Tensor, group_len: int, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._take(f"quantize/{group_len}/{eps:g}", w)
        return torch.full(w.shape, 7, dtype=torch.int8), torch.full((len(w), 1), MARK)

    def abs_sums(self, w: torch.Tensor, group_len: int) -> torch.Tensor:
        self._take(f"abs_sums/{group_len}", w)
        return torch.full((len(w), w.shape[1] // group_len), MARK)

    def fake_quantize_with_scales(self, w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        self._take("fake_quantize_with_scales", w, scales)
        return torch.full_like(w, MARK)

    def pack2(self, codes: torch.Tensor) -> torch.Tensor:
        self._take("pack2", codes)
        return torch.full((len(codes), 32), 7, dtype=torch.uint8)

    def fake_quantize_list(self, ws: list[torch.Tensor], group_lens: list[int], eps: float) -> None:
        self._take(f"fake_quantize_list/{group_lens}/{eps:g}", *ws)
        for w in ws:
            w.data.fill_(MARK)  # as a kernel would: autograd does not see it

    def fake_quantize_with_scales_list(
        self, ws: list[torch.Tensor], scales: list[torch.Tensor]
    ) -> None:
        self._take("fake_quantize_with_scales_list", *ws, *scales)
        for w in ws:
            w.data.fill_(MARK)


def call(name: str, *args: Any) -> Any:
    """Call an operator's PrivateUse1 kernel through the dispatcher."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    return getattr(torch.ops.bitcpm, name).default.redispatch(key, *args)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start from a process that has not looked for the module, and leave no trace."""
    for name, value in (("native", None), ("load_error", None), ("device", None)):
        monkeypatch.setattr(_npu, name, value)
    monkeypatch.setattr(_npu, "_tried", False)
    monkeypatch.delitem(sys.modules, "megatron_bitcpm._npu", raising=False)
    yield
    ops.use_backend("auto")


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch_npu be imported."""
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))


@pytest.fixture
def native(torch_npu: None, monkeypatch: pytest.MonkeyPatch) -> NativeModule:
    """Let the compiled module be there, too."""
    module = NativeModule()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


# -- which implementation -------------------------------------------------------------------------


def test_kernels_take_the_ternary_grid(native: NativeModule) -> None:
    w, scales = weight(), torch.ones(4, 2)
    assert (call("fake_quantize", w, 32, 0.5) == MARK).all()
    codes, _ = call("quantize", w)
    assert codes.dtype == torch.int8 and (codes == 7).all()
    assert call("abs_sums", w, 16).shape == (4, 4)
    assert (call("fake_quantize_with_scales", w, scales) == MARK).all()
    assert (call("pack2", torch.zeros(2, 5, dtype=torch.int8)) == 7).all()
    assert native.calls == [
        ("fake_quantize/32/0.5", (4, 64)),
        ("quantize/64/1e-05", (4, 64)),
        ("abs_sums/16", (4, 64)),
        ("fake_quantize_with_scales", (4, 64), (4, 2)),
        ("pack2", (2, 5)),
    ]


@pytest.mark.parametrize("grid", ["asym4", "half_sym4", "int_sym4", "five"])
def test_other_grids_run_the_reference(native: NativeModule, grid: str) -> None:
    w = weight()
    expected = ops.fake_quantize(w, 32, grid=grid)
    assert torch.equal(call("fake_quantize", w, 32, 1e-5, grid), expected)
    _, scales = call("quantize", w, 32, 1e-5, grid)
    assert torch.equal(call("fake_quantize_with_scales", w, scales, grid), expected)
    for name, args in (
        ("fake_quantize_", (w.clone(), 32, 1e-5, grid)),
        ("fake_quantize_with_scales_", (w.clone(), scales, grid)),
        ("foreach_fake_quantize_", ([w.clone()], 32, 1e-5, grid)),
        ("foreach_fake_quantize_with_scales_", ([w.clone()], [scales], grid)),
    ):
        call(name, *args)
        written = args[0][0] if isinstance(args[0], list) else args[0]
        assert torch.equal(written, expected), name
    assert native.calls == []


def test_operators_without_a_kernel_run_the_reference(native: NativeModule) -> None:
    codes = torch.randint(-1, 2, (3, 130), dtype=torch.int8)
    assert torch.equal(call("unpack2", ops.pack2(codes), 130), codes)
    x = weight(torch.float32)
    assert torch.equal(call("int8_per_token", x), ops.int8_per_token(x))
    assert native.calls == []


def test_private_formats_run_the_reference(native: NativeModule) -> None:
    w, other = weight(), weight()
    native.private.append(w)
    expected = ops.fake_quantize(other, 32)
    assert torch.equal(call("fake_quantize", w, 32), expected)
    call("foreach_fake_quantize_", [other, w], 32)
    assert torch.equal(w, expected) and torch.equal(other, expected)
    assert native.calls == []


def test_use_backend_reference(native: NativeModule) -> None:
    ops.use_backend("native", "npu")
    ops.use_backend("reference", "npu")
    w = weight()
    assert torch.equal(call("fake_quantize", w, 32), ops.fake_quantize(w, 32))
    report = ops.backend_report()["npu"]
    assert report["backend"] == "reference" and report["reason"] == "quant.backend=reference"
    assert native.calls == []


def test_report_of_a_loaded_module(native: NativeModule) -> None:
    report = ops.backend_report()["npu"]
    assert report["backend"] == "native" and report["load_error"] is None
    assert report["device"] == {"vector_cores": 48, "ub_bytes": 196608}
    assert report["grids"] == ["ternary"] and "pack2" in report["ops"]
    assert "unpack2" not in report["ops"]


# -- memory ---------------------------------------------------------------------------------------


def test_in_place_over_a_list_is_one_call(native: NativeModule) -> None:
    ws = [weight(), torch.randn(3, 16), torch.empty(0, 8), torch.empty(2, 0)]
    call("foreach_fake_quantize_", ws, -1, 0.25)
    assert native.calls == [
        ("fake_quantize_list/[64, 16, 8, 1]/0.25", (4, 64), (3, 16), (0, 8), (2, 0))
    ]
    assert all((w == MARK).all() for w in ws)
    scales = [torch.ones(4, 2), torch.ones(3, 1)]
    call("foreach_fake_quantize_with_scales_", ws[:2], scales)
    assert native.calls[1] == ("fake_quantize_with_scales_list", (4, 64), (3, 16), (4, 2), (3, 1))


@pytest.mark.parametrize("name", ["fake_quantize_", "foreach_fake_quantize_"])
def test_in_place_bumps_versions(native: NativeModule, name: str) -> None:
    w = weight()
    before = w._version
    call(name, w if name == "fake_quantize_" else [w], 32)
    assert w._version > before
    scales = torch.ones(4, 2)
    before = w._version
    call("fake_quantize_with_scales_", w, scales)
    assert w._version > before and scales._version == 0
    before = w._version
    call("foreach_fake_quantize_with_scales_", [w], [scales])
    assert w._version > before


def test_non_contiguous_weights_are_copied(native: NativeModule) -> None:
    storage = torch.zeros(8, 64)
    w = storage[::2]
    assert (call("fake_quantize", w, 32) == MARK).all() and not storage.any()
    call("fake_quantize_", w, 32)
    assert (storage[::2] == MARK).all() and not storage[1::2].any()
    transposed = torch.zeros(64, 4).t()
    call("foreach_fake_quantize_with_scales_", [transposed], [torch.ones(1, 4).t()])
    assert (transposed == MARK).all() and not transposed.is_contiguous()


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("fake_quantize", (torch.zeros(2, 8, dtype=torch.float64),), "w.dtype=torch.float64"),
        ("fake_quantize", (torch.zeros(8),), "w.shape=[8]"),
        ("fake_quantize", (torch.zeros(2, 8), 3), "group_size=3"),
        ("fake_quantize", (torch.zeros(2, 8), 4, 0.0), "eps=0.0"),
        ("fake_quantize", (torch.zeros(2, 8), 4, 1e-5, "six"), "grid=six"),
        ("abs_sums", (torch.zeros(2, 8), 0), "group_size=0"),
        ("fake_quantize_with_scales", (torch.zeros(2, 8), torch.ones(2, 3)), "scales.shape=[2, 3]"),
        ("fake_quantize_", (torch.zeros(1, 8).expand(2, 8),), "w.strides=[0, 1]"),
        ("pack2", (torch.tensor([[0, 1], [0, 2]], dtype=torch.int8),), "codes[1, 1]=2"),
        ("pack2", (torch.zeros(2, 8),), "codes.dtype=torch.float32"),
    ],
)
def test_bad_input_is_one_line(
    native: NativeModule, name: str, args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(BitcpmError) as caught:
        call(name, *args)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert native.calls == []


def test_a_weight_twice_in_a_list_is_refused(native: NativeModule) -> None:
    w = weight()
    before = w.clone()
    with pytest.raises(BitcpmError, match="shares memory"):
        call("foreach_fake_quantize_", [w, w[:2]], 32)
    assert torch.equal(w, before) and native.calls == []


# -- what the module does not have -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "activation", "missing", "described"),
    [
        ("five", "none", "quant.grid five", "reference on npu ("),
        ("five", "int8_per_token", "quant.grid five", "reference on npu ("),
        (
            "ternary",
            "int8_per_token",
            "quant.activation int8_per_token",
            "native for weights, reference for activations on npu (",
        ),
    ],
)
def test_native_means_grid_and_activation_too(
    native: NativeModule, grid: str, activation: str, missing: str, described: str
) -> None:
    with pytest.raises(BackendError) as caught:
        ops.use_backend("native", "npu", grid, activation)
    assert str(caught.value) == (
        f"quant.backend=native: no compiled operators for {missing} on npu. Use auto."
    )
    ops.use_backend("auto", "npu", grid, activation)
    why = ops.describe_backend("npu", grid, activation)
    assert why.startswith(f"{described}no compiled operators for {missing}"), why
    ops.use_backend("native", "npu", "ternary", "none")
    assert ops.describe_backend("npu") == "native on npu (compiled module loaded)"
    ops.use_backend("reference", "npu", grid, activation)
    assert ops.describe_backend("npu", grid) == "reference on npu (quant.backend=reference)"


# -- absent and broken modules --------------------------------------------------------------------


def assert_reference(reason: str) -> None:
    w = weight()
    assert torch.equal(call("fake_quantize", w, 32), ops.fake_quantize(w, 32))
    report = ops.backend_report()["npu"]
    assert report["backend"] == "reference" and report["ops"] == []
    with pytest.raises(BackendError) as caught:
        ops.use_backend("native", "npu")
    assert reason in str(caught.value) and "docs/ascend.md" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_torch_npu_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    module = NativeModule()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert_reference("torch_npu is not imported in this process")
    assert "torch_npu" not in sys.modules and module.calls == []
    assert ops.backend_report()["npu"]["load_error"] is None


def test_torch_npu_may_come_later(native: NativeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules.pop("torch_npu")
    assert_reference("torch_npu is not imported")
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    assert (call("fake_quantize", weight(), 32) == MARK).all()
    ops.use_backend("native", "npu")


def test_absent_module(torch_npu: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert_reference("No module named 'megatron_bitcpm._npu'")
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1 and "NPU operators" in messages[0] and "reference" in messages[0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('no libplatform.so\\nhere')", "ImportError: no libplatform.so here"),
        ("x = 1 / 0", "ZeroDivisionError"),
        ("def describe_device(): return {}", "another version, without has_plain_format"),
    ],
)
def test_broken_module(
    torch_npu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    (tmp_path / "_npu.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(megatron_bitcpm, "__path__", [str(tmp_path), *megatron_bitcpm.__path__])
    monkeypatch.delattr(megatron_bitcpm, "_npu", raising=False)
    assert_reference(reason)
    assert reason in str(ops.backend_report()["npu"]["load_error"])


def test_unknown_device(native: NativeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe_device() -> dict[str, int]:
        raise RuntimeError("the kernels are for Ascend 910B and 910C only")

    monkeypatch.setattr(native, "describe_device", describe_device)
    assert_reference("the kernels are for Ascend 910B and 910C only")
    assert native.calls == []


# -- gradients ------------------------------------------------------------------------------------


def test_gradient_goes_straight_through(native: NativeModule) -> None:
    w = weight(torch.float32).requires_grad_()
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1).add(
        torch._C.DispatchKey.AutogradPrivateUse1
    )
    wq = torch.ops.bitcpm.fake_quantize.default.redispatch(keys, w, 32)
    assert (wq == MARK).all()
    (wq * 3).sum().backward()
    assert w.grad is not None and (w.grad == 3).all()
