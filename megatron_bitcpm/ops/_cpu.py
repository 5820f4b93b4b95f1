"""The operators on the CPU: the compiled module `megatron_bitcpm._cpu` behind the torch contract.

The module knows no torch, it works on addresses of tensors that `_operators` has checked. Results
equal the reference bit for bit. torch is imported first, so that both use one OpenMP library and
its threads: two pools would spin against each other.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megatron_bitcpm.errors import BackendError, one_line
from megatron_bitcpm.ops._operators import Operators
from megatron_bitcpm.ops._reference import EMPTY, REFERENCE, Kernels
from megatron_bitcpm.ops._schema import LIBRARY, SCHEMAS
from megatron_bitcpm.quant import packing

# As `DType` and `Grid` in csrc/common/contract.h. Any other grid runs the reference.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GRID_CODES = {"ternary": 0, "asym4": 1, "half_sym4": 2, "int_sym4": 3, "five": 4}
# `abi` of csrc/cpu/module.cpp: the functions and arguments that are called here.
_ABI = 1

native: Any = None
load_error: str | None = None
isa: str | None = None
# Set by ops.use_backend: False sends the CPU to the reference although the module is there.
enabled = True


class _CompiledKernels(Kernels):
    def fake_quantize(self, w: torch.Tensor, group_len: int, eps: float, grid: str) -> torch.Tensor:
        wq = EMPTY.fake_quantize(w, group_len, eps, grid)
        _write_levels([(w, wq, group_len)], eps, grid)
        return wq

    def quantize(
        self, w: torch.Tensor, group_len: int, eps: float, grid: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = EMPTY.quantize(w, group_len, eps, grid)
        if w.numel():
            native.quantize(
                w.data_ptr(),
                codes.data_ptr(),
                scales.data_ptr(),
                *find_codes(w.dtype, grid),
                scales.numel(),
                group_len,
                eps,
                torch.get_num_threads(),
            )
        return codes, scales

    def abs_sums(self, w: torch.Tensor, group_len: int) -> torch.Tensor:
        sums = EMPTY.abs_sums(w, group_len)
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
        self, w: torch.Tensor, scales_OG: torch.Tensor, grid: str
    ) -> torch.Tensor:
        wq = EMPTY.fake_quantize_with_scales(w, scales_OG, grid)
        _write_levels_with_scales([(w, wq, scales_OG)], grid)
        return wq

    def fake_quantize_list(
        self, ws: Sequence[torch.Tensor], group_lens: Sequence[int], eps: float, grid: str
    ) -> None:
        _write_levels(zip(ws, ws, group_lens, strict=True), eps, grid)

    def fake_quantize_with_scales_list(
        self, ws: Sequence[torch.Tensor], scales_of_ws: Sequence[torch.Tensor], grid: str
    ) -> None:
        _write_levels_with_scales(zip(ws, ws, scales_of_ws, strict=True), grid)

    def pack2(self, codes: torch.Tensor) -> torch.Tensor:
        packed = EMPTY.pack2(codes)
        if codes.numel():
            bad_row = native.pack2(
                codes.data_ptr(), packed.data_ptr(), *codes.shape, torch.get_num_threads()
            )
            if bad_row >= 0:
                raise packing.describe_bad_code(codes, bad_row)
        return packed

    def unpack2(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        codes = EMPTY.unpack2(packed, in_features)
        if codes.numel():
            bad_row = native.unpack2(
                packed.data_ptr(), codes.data_ptr(), *codes.shape, torch.get_num_threads()
            )
            if bad_row >= 0:
                raise packing.describe_bad_field(packed, bad_row)
        return codes

    def int8_per_token(self, x: torch.Tensor) -> torch.Tensor:
        x_q = EMPTY.int8_per_token(x)
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


def _write_levels(
    tensors: Iterable[tuple[torch.Tensor, torch.Tensor, int]], eps: float, grid: str
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
    tensors: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], grid: str
) -> None:
    """Write wq of each (w, wq, scales_OG) in one call; wq may be w."""
    jobs = [
        (
            w.data_ptr(),
            scales.data_ptr(),
            wq.data_ptr(),
            _DTYPE_CODES[w.dtype],
            scales.numel(),
            w.numel() // scales.numel(),
        )
        for w, wq, scales in tensors
        if w.numel()
    ]
    if jobs:
        native.fake_quantize_with_scales(jobs, _GRID_CODES[grid], torch.get_num_threads())


def _choose(tensors: Sequence[torch.Tensor], grid: str) -> Kernels:
    return _KERNELS if enabled and grid in _GRID_CODES else REFERENCE


_KERNELS = _CompiledKernels()
OPERATORS = Operators(_choose)
NAMES = tuple(SCHEMAS)
GRIDS = _GRID_CODES.keys()


def find_codes(dtype: torch.dtype, grid: str) -> tuple[int, int]:
    """Return the compiled module's numbers for a dtype and a grid."""
    return _DTYPE_CODES[dtype], _GRID_CODES[grid]


def select_isa(name: str) -> str:
    """Choose the instruction set of the compiled kernels and return its name.

    `name` is "avx512", "avx2", "neon" or "generic", or "" or "auto" for the best of this processor.
    Raises BackendError where the module is absent or this processor or build has no such set.
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


def is_loaded() -> bool:
    """Tell whether the compiled module is there."""
    return native is not None


def describe_details() -> dict[str, Any]:
    """Return what only the CPU has to report: the instruction set and those to choose from."""
    live = is_loaded() and enabled
    return {
        "isa": isa if live else None,
        "isas": list(native.supported_isas()) if live else [],
    }


def register(isa_name: str) -> None:
    """Load the compiled module and register its kernels, or store in `load_error` why it is absent.

    `isa_name` is as for `select_isa`, and is an error only where the module is sound.
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
        load_error = one_line(f"{type(error).__name__}: {error}", limit=2000)
    if load_error:
        native = None
        return
    for name in NAMES:
        LIBRARY.impl(name, getattr(OPERATORS, name), "CPU")
