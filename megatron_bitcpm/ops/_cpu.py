"""The operators on the CPU: the compiled module `megatron_bitcpm._cpu` behind the torch contract.

The module knows no torch, it works on addresses. So here, and nowhere else, every property it
relies on is checked: type, two dimensions, contiguous memory, whole groups. Results equal the
reference bit for bit. torch is imported first, so that both use one OpenMP library and its threads:
two pools would spin against each other.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megatron_bitcpm.errors import BackendError
from megatron_bitcpm.ops import _reference
from megatron_bitcpm.ops._schema import LIBRARY, check_weight, check_weight_and_scales
from megatron_bitcpm.quant.groups import resolve_group_size
from megatron_bitcpm.quant.ternary import check_eps

# As `DType` in csrc/common/contract.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

native: Any = None
load_error: str | None = None
isa: str | None = None
# Outputs from this size get a huge-page hint: on 4096x4096 bfloat16 it saves half to two thirds of
# the time, which goes into the first touch of 8192 small pages. None turns the hint off.
huge_page_min_bytes: int | None = 8 << 20
# Set by ops.use_backend: False sends the CPU to the reference although the module is there.
enabled = True


def fake_quantize(w: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize`."""
    if not enabled:
        return _reference.fake_quantize(w, group_size, eps)
    w, group_len = _prepare(w, group_size, eps)
    wq = _allocate_output(w)
    if w.numel():
        _write_levels(w, wq, group_len, eps)
    return wq


def quantize(w: torch.Tensor, group_size: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `megatron_bitcpm.ops.quantize`."""
    if not enabled:
        return _reference.quantize(w, group_size, eps)
    w, group_len = _prepare(w, group_size, eps)
    codes = torch.empty_like(w, dtype=torch.int8)
    scales = _allocate_per_group(w, group_len)
    if w.numel():
        native.quantize(
            w.data_ptr(), codes.data_ptr(), scales.data_ptr(), _DTYPE_CODES[w.dtype],
            scales.numel(), group_len, eps, torch.get_num_threads(),
        )  # fmt: skip
    return codes, scales


def abs_sums(w: torch.Tensor, group_size: int) -> torch.Tensor:
    """See `megatron_bitcpm.ops.abs_sums`."""
    if not enabled:
        return _reference.abs_sums(w, group_size)
    w, group_len = _prepare(w, group_size, 1.0)
    sums = _allocate_per_group(w, group_len)
    if w.numel():
        native.abs_sums(
            w.data_ptr(), sums.data_ptr(), _DTYPE_CODES[w.dtype], sums.numel(), group_len,
            torch.get_num_threads(),
        )  # fmt: skip
    return sums


def fake_quantize_with_scales(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales`."""
    if not enabled:
        return _reference.fake_quantize_with_scales(w, scales)
    check_weight_and_scales(w, scales)
    w = w.contiguous()
    wq = _allocate_output(w)
    if w.numel():
        _write_levels_with_scales(w, wq, scales)
    return wq


def fake_quantize_(w: torch.Tensor, group_size: int, eps: float) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_`."""
    if not (enabled and w.is_contiguous()):
        with torch.no_grad():
            w.copy_(fake_quantize(w, group_size, eps))
        return
    w, group_len = _prepare(w, group_size, eps)
    if w.numel():
        _write_levels(w, w, group_len, eps)
    # Autograd must notice that a tensor it saved has changed behind its back.
    torch.autograd.graph.increment_version(w)


def fake_quantize_with_scales_(w: torch.Tensor, scales: torch.Tensor) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales_`."""
    if not (enabled and w.is_contiguous()):
        with torch.no_grad():
            w.copy_(fake_quantize_with_scales(w, scales))
        return
    check_weight_and_scales(w, scales)
    if w.numel():
        _write_levels_with_scales(w, w, scales)
    torch.autograd.graph.increment_version(w)


def _prepare(w: torch.Tensor, group_size: int, eps: float) -> tuple[torch.Tensor, int]:
    check_weight(w)
    check_eps(eps)
    return w.contiguous(), resolve_group_size(w.shape[1], group_size)


def _allocate_output(w: torch.Tensor) -> torch.Tensor:
    wq = torch.empty_like(w)
    if huge_page_min_bytes is not None and wq.nbytes >= huge_page_min_bytes:
        native.advise_huge_pages(wq.data_ptr(), wq.nbytes)
    return wq


def _allocate_per_group(w: torch.Tensor, group_len: int) -> torch.Tensor:
    num_groups = w.shape[1] // group_len if group_len else 0
    return w.new_empty(w.shape[0], num_groups, dtype=torch.float32)


def _write_levels(w: torch.Tensor, wq: torch.Tensor, group_len: int, eps: float) -> None:
    native.fake_quantize(
        w.data_ptr(), wq.data_ptr(), _DTYPE_CODES[w.dtype], w.numel() // group_len, group_len,
        eps, torch.get_num_threads(),
    )  # fmt: skip


def _write_levels_with_scales(w: torch.Tensor, wq: torch.Tensor, scales: torch.Tensor) -> None:
    scales = scales.contiguous()
    native.fake_quantize_with_scales(
        w.data_ptr(), scales.data_ptr(), wq.data_ptr(), _DTYPE_CODES[w.dtype], scales.numel(),
        w.numel() // scales.numel(), torch.get_num_threads(),
    )  # fmt: skip


KERNELS = {
    "fake_quantize": fake_quantize,
    "quantize": quantize,
    "abs_sums": abs_sums,
    "fake_quantize_with_scales": fake_quantize_with_scales,
    "fake_quantize_": fake_quantize_,
    "fake_quantize_with_scales_": fake_quantize_with_scales_,
}


def select_isa(name: str) -> str:
    """Choose the instruction set of the compiled kernels and return its name.

    Args:
        name: "avx512", "avx2" or "generic"; "" or "auto" for the best of this processor.
    Raises:
        BackendError: the module is absent, or this processor or build has no such set.
    """
    global isa
    if native is None:
        raise BackendError.of("BITCPM_CPU_ISA", name, f"no CPU kernels: {load_error}", "Build them")
    choices = native.supported_isas()
    if name not in ("", "auto", *choices):
        raise BackendError.of(
            "BITCPM_CPU_ISA",
            name,
            "this processor and build have no such kernels",
            f"Use auto or {' or '.join(choices)}",
        )
    isa = str(native.select_isa(name or "auto"))
    return isa


def register(isa_name: str) -> None:
    """Load the compiled module and register its kernels for the CPU, or store why it is absent.

    Args:
        isa_name: as for `select_isa`; ignored when the module is absent.
    """
    global native, load_error
    try:
        native = importlib.import_module("megatron_bitcpm._cpu")
    except ImportError as error:
        load_error = f"{type(error).__name__}: {error}"
        return
    select_isa(isa_name)
    for name, kernel in KERNELS.items():
        LIBRARY.impl(name, kernel, "CPU")
