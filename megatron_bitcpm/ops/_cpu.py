"""The operators on the CPU: the compiled module `megatron_bitcpm._cpu` behind the torch contract.

The module knows no torch, it works on addresses. So here, and nowhere else, every property it
relies on is checked: type, dimensions, contiguous memory, whole groups, memory written once.
Results equal the reference bit for bit. torch is imported first, so that both use one OpenMP
library and its threads: two pools would spin against each other.

A weight that is not contiguous is copied; the in-place forms copy the result back.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from megatron_bitcpm.errors import BackendError
from megatron_bitcpm.ops import _checks, _reference
from megatron_bitcpm.ops._schema import LIBRARY
from megatron_bitcpm.quant.grids import GRIDS, TERNARY, find_grid
from megatron_bitcpm.quant.groups import resolve_group_size
from megatron_bitcpm.quant.packing import (
    count_packed_bytes,
    describe_bad_code,
    describe_bad_field,
)
from megatron_bitcpm.quant.scales import DEFAULT_EPS, check_eps

# As `DType` and `Grid` in csrc/common/contract.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GRID_CODES = {"ternary": 0, "asym4": 1, "half_sym4": 2, "int_sym4": 3, "five": 4}
# `abi` of csrc/cpu/module.cpp: the functions and arguments that are called here.
_ABI = 1

native: Any = None
load_error: str | None = None
isa: str | None = None
# Set by ops.use_backend: False sends the CPU to the reference although the module is there.
enabled = True


def fake_quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize`."""
    if not enabled:
        return _reference.fake_quantize(w, group_size, eps, grid)
    w, group_len = _prepare(w, group_size, eps, grid)
    wq = torch.empty_like(w)
    _write_levels([(w, wq, group_len)], eps, grid)
    return wq


def quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `megatron_bitcpm.ops.quantize`."""
    if not enabled:
        return _reference.quantize(w, group_size, eps, grid)
    w, group_len = _prepare(w, group_size, eps, grid)
    codes = torch.empty_like(w, dtype=torch.int8)
    scales = _allocate_per_group(w, group_len)
    if w.numel():
        native.quantize(
            w.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            _DTYPE_CODES[w.dtype],
            _GRID_CODES[grid],
            scales.numel(),
            group_len,
            eps,
            torch.get_num_threads(),
        )
    return codes, scales


def abs_sums(w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """See `megatron_bitcpm.ops.abs_sums`."""
    if not enabled:
        return _reference.abs_sums(w, group_size)
    w, group_len = _prepare(w, group_size, DEFAULT_EPS, TERNARY)
    sums = _allocate_per_group(w, group_len)
    if w.numel():
        native.abs_sums(
            w.data_ptr(),
            sums.data_ptr(),
            _DTYPE_CODES[w.dtype],
            sums.numel(),
            group_len,
            torch.get_num_threads(),
        )
    return sums


def fake_quantize_with_scales(
    w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales`."""
    if not enabled:
        return _reference.fake_quantize_with_scales(w, scales, grid)
    _checks.check_weight_and_scales(w, scales)
    find_grid(grid)
    w = w.contiguous()
    wq = torch.empty_like(w)
    _write_levels_with_scales([(w, wq, scales)], grid)
    return wq


def fake_quantize_(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_`."""
    if not enabled:
        return _reference.fake_quantize_(w, group_size, eps, grid)
    flat, group_len = _prepare(w, group_size, eps, grid)
    # Only a view with odd strides can overlap itself; the look costs as much as 100,000 weights.
    if flat is not w:
        _checks.check_written([w])
    if flat.numel():
        address = flat.data_ptr()
        job = (address, address, _DTYPE_CODES[w.dtype], flat.numel() // group_len, group_len)
        native.fake_quantize([job], _GRID_CODES[grid], eps, torch.get_num_threads())
    _reference.store(w, flat)


def fake_quantize_with_scales_(w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales_`."""
    if not enabled:
        return _reference.fake_quantize_with_scales_(w, scales, grid)
    _checks.check_weight_and_scales(w, scales)
    find_grid(grid)
    _checks.check_written([w], [scales])
    flat = w.contiguous()
    _write_levels_with_scales([(flat, flat, scales)], grid)
    _reference.store(w, flat)


def foreach_fake_quantize_(
    ws: Sequence[torch.Tensor],
    group_size: int = -1,
    eps: float = DEFAULT_EPS,
    grid: str = TERNARY,
) -> None:
    """See `megatron_bitcpm.ops.foreach_fake_quantize_`."""
    if not enabled:
        return _reference.foreach_fake_quantize_(ws, group_size, eps, grid)
    _reference.check_list(ws, group_size, eps, grid)
    flats = [w.contiguous() for w in ws]
    lengths = [resolve_group_size(w.shape[1], group_size) for w in ws]
    _write_levels([(w, w, n) for w, n in zip(flats, lengths, strict=True)], eps, grid)
    for w, flat in zip(ws, flats, strict=True):
        _reference.store(w, flat)


def foreach_fake_quantize_with_scales_(
    ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], grid: str = TERNARY
) -> None:
    """See `megatron_bitcpm.ops.foreach_fake_quantize_with_scales_`."""
    if not enabled:
        return _reference.foreach_fake_quantize_with_scales_(ws, scales, grid)
    _reference.check_list_and_scales(ws, scales, grid)
    flats = [w.contiguous() for w in ws]
    jobs = [(w, w, scales_OG) for w, scales_OG in zip(flats, scales, strict=True)]
    _write_levels_with_scales(jobs, grid)
    for w, flat in zip(ws, flats, strict=True):
        _reference.store(w, flat)


def pack2(codes: torch.Tensor) -> torch.Tensor:
    """See `megatron_bitcpm.ops.pack2`."""
    if not enabled:
        return _reference.pack2(codes)
    _checks.check_codes(codes)
    codes = codes.contiguous()
    rows, cols = codes.shape
    packed = codes.new_empty(rows, count_packed_bytes(cols), dtype=torch.uint8)
    if codes.numel():
        bad_row = native.pack2(
            codes.data_ptr(), packed.data_ptr(), rows, cols, torch.get_num_threads()
        )
        if bad_row >= 0:
            raise describe_bad_code(codes, bad_row)
    return packed


def unpack2(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """See `megatron_bitcpm.ops.unpack2`."""
    if not enabled:
        return _reference.unpack2(packed, in_features)
    _checks.check_packed(packed, in_features)
    packed = packed.contiguous()
    codes = packed.new_empty(packed.shape[0], in_features, dtype=torch.int8)
    if codes.numel():
        bad_row = native.unpack2(
            packed.data_ptr(), codes.data_ptr(), *codes.shape, torch.get_num_threads()
        )
        if bad_row >= 0:
            raise describe_bad_field(packed, bad_row)
    return codes


def int8_per_token(x: torch.Tensor) -> torch.Tensor:
    """See `megatron_bitcpm.ops.int8_per_token`."""
    if not enabled:
        return _reference.int8_per_token(x)
    _checks.check_activation(x)
    x = x.contiguous()
    x_q = torch.empty_like(x)
    if x.numel():
        cols = x.shape[-1]
        native.int8_per_token(
            x.data_ptr(),
            x_q.data_ptr(),
            _DTYPE_CODES[x.dtype],
            x.numel() // cols,
            cols,
            torch.get_num_threads(),
        )
    return x_q


def _prepare(w: torch.Tensor, group_size: int, eps: float, grid: str) -> tuple[torch.Tensor, int]:
    _checks.check_weight(w)
    check_eps(eps)
    find_grid(grid)
    return w.contiguous(), resolve_group_size(w.shape[1], group_size)


def _allocate_per_group(w: torch.Tensor, group_len: int) -> torch.Tensor:
    num_groups = w.shape[1] // group_len if group_len else 0
    return w.new_empty(w.shape[0], num_groups, dtype=torch.float32)


def _write_levels(
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor, int]], eps: float, grid: str
) -> None:
    """Write wq of each (w, wq, group_len) in one call; wq may be w."""
    jobs = [
        (w.data_ptr(), wq.data_ptr(), _DTYPE_CODES[w.dtype], w.numel() // n, n)
        for w, wq, n in tensors
        if w.numel()
    ]
    if jobs:
        native.fake_quantize(jobs, _GRID_CODES[grid], eps, torch.get_num_threads())


def _write_levels_with_scales(
    tensors: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], grid: str
) -> None:
    """Write wq of each (w, wq, scales_OG) in one call; wq may be w."""
    # The list keeps contiguous copies of the scales alive until the call is over.
    with_flat_scales = [(w, wq, scales.contiguous()) for w, wq, scales in tensors if w.numel()]
    jobs = [
        (
            w.data_ptr(),
            scales.data_ptr(),
            wq.data_ptr(),
            _DTYPE_CODES[w.dtype],
            scales.numel(),
            w.numel() // scales.numel(),
        )
        for w, wq, scales in with_flat_scales
    ]
    if jobs:
        native.fake_quantize_with_scales(jobs, _GRID_CODES[grid], torch.get_num_threads())


KERNELS = {
    "fake_quantize": fake_quantize,
    "quantize": quantize,
    "abs_sums": abs_sums,
    "fake_quantize_with_scales": fake_quantize_with_scales,
    "fake_quantize_": fake_quantize_,
    "fake_quantize_with_scales_": fake_quantize_with_scales_,
    "foreach_fake_quantize_": foreach_fake_quantize_,
    "foreach_fake_quantize_with_scales_": foreach_fake_quantize_with_scales_,
    "pack2": pack2,
    "unpack2": unpack2,
    "int8_per_token": int8_per_token,
}


def find_codes(dtype: torch.dtype, grid: str) -> tuple[int, int]:
    """Return the compiled module's numbers for a dtype and a grid."""
    return _DTYPE_CODES[dtype], _GRID_CODES[grid]


def select_isa(name: str) -> str:
    """Choose the instruction set of the compiled kernels and return its name.

    Args:
        name: "avx512", "avx2", "neon" or "generic"; "" or "auto" for the best of this processor.
    Raises:
        BackendError: the module is absent, or this processor or build has no such set.
    """
    global isa
    if native is None:
        raise BackendError(f"BITCPM_CPU_ISA={name}: no CPU kernels: {load_error}. Build them.")
    choices = native.supported_isas()
    if name not in ("", "auto", *choices):
        raise BackendError(
            f"BITCPM_CPU_ISA={name}: this processor and build have no such kernels. Use auto or "
            f"{' or '.join(choices)}."
        )
    isa = str(native.select_isa(name or "auto"))
    return isa


def list_compiled() -> dict[str, list[str]]:
    """Return the operators and grids that the compiled module has, by "ops" and "grids"."""
    return {"ops": sorted(KERNELS), "grids": list(GRIDS)}


def report() -> dict[str, Any]:
    """Say which implementation the CPU has, and why; part of `ops.backend_report`."""
    live = native is not None and enabled
    if live:
        reason = "compiled module loaded"
    elif native is None:
        reason = "compiled module did not load"
    else:
        reason = "quant.backend=reference"
    return {
        "backend": "native" if live else "reference",
        "isa": isa if live else None,
        "isas": list(native.supported_isas()) if live else [],
        "reason": reason,
        "load_error": load_error,
        **(list_compiled() if live else {"ops": [], "grids": []}),
    }


def unavailable_reason() -> str | None:
    """Return why `quant.backend: native` cannot be had on the CPU, or None."""
    if native is None:
        return f"the compiled CPU operators did not load ({load_error})"
    return None


def register(isa_name: str) -> None:
    """Load the compiled module and register its kernels for the CPU, or store why it is absent.

    Args:
        isa_name: as for `select_isa`; ignored when the module is absent.
    Raises:
        BackendError: the module is sound and has no such instruction set.
    """
    global native, load_error
    try:
        native = importlib.import_module("megatron_bitcpm._cpu")
        abi = getattr(native, "abi", None)
        if abi != _ABI:
            load_error = f"built from another version (abi {abi}, not {_ABI}): reinstall"
        else:
            select_isa(isa_name)
    except BackendError:
        raise
    except Exception as error:  # whatever a broken build raises, the reference still works
        load_error = " ".join(f"{type(error).__name__}: {error}".split())
    if load_error:
        native = None
        return
    for name, kernel in KERNELS.items():
        LIBRARY.impl(name, kernel, "CPU")
