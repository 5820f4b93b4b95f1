"""The operators on an Ascend NPU: the compiled module `megatron_bitcpm._npu` behind the contract.

The kernels are for the ternary grid. Everything else runs the reference there, which gives the same
bits: the other grids, `unpack2`, `int8_per_token`, weights in a private format of torch_npu, and
every operator where the module did not load. No operator but `pack2` waits for the device.

Dispatch is registered at once, the module is loaded by the first call or report after torch_npu was
imported: in either order of imports the kernels are found, and torch_npu is never imported here.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from megatron_bitcpm.errors import one_line
from megatron_bitcpm.ops._operators import Operators
from megatron_bitcpm.ops._reference import REFERENCE, Kernels
from megatron_bitcpm.ops._schema import LIBRARY, SCHEMAS
from megatron_bitcpm.quant import packing
from megatron_bitcpm.quant.grids import TERNARY

# What the compiled module must have; one of an older version has less.
_FUNCTIONS = (
    "describe_device",
    "has_plain_format",
    "fake_quantize",
    "quantize",
    "abs_sums",
    "fake_quantize_with_scales",
    "pack2",
    "fake_quantize_list",
    "fake_quantize_with_scales_list",
)

GRIDS = (TERNARY,)
NAMES = tuple(name for name in SCHEMAS if name not in ("unpack2", "int8_per_token"))

native: Any = None
load_error: str | None = None
device: dict[str, int] | None = None
# Set by ops.use_backend: False sends NPUs to the reference although the module is there.
enabled = True
_tried = False


class _CompiledKernels(Kernels):
    def fake_quantize(self, w: torch.Tensor, group_len: int, eps: float, grid: str) -> torch.Tensor:
        return native.fake_quantize(w, group_len, eps)  # type: ignore[no-any-return]

    def quantize(
        self, w: torch.Tensor, group_len: int, eps: float, grid: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return native.quantize(w, group_len, eps)  # type: ignore[no-any-return]

    def abs_sums(self, w: torch.Tensor, group_len: int) -> torch.Tensor:
        return native.abs_sums(w, group_len)  # type: ignore[no-any-return]

    def fake_quantize_with_scales(
        self, w: torch.Tensor, scales_OG: torch.Tensor, grid: str
    ) -> torch.Tensor:
        return native.fake_quantize_with_scales(w, scales_OG)  # type: ignore[no-any-return]

    def fake_quantize_list(
        self, ws: Sequence[torch.Tensor], group_lens: Sequence[int], eps: float, grid: str
    ) -> None:
        native.fake_quantize_list(ws, group_lens, eps)

    def fake_quantize_with_scales_list(
        self, ws: Sequence[torch.Tensor], scales_of_ws: Sequence[torch.Tensor], grid: str
    ) -> None:
        native.fake_quantize_with_scales_list(ws, scales_of_ws)

    def pack2(self, codes: torch.Tensor) -> torch.Tensor:
        # A kernel cannot raise, so the codes are looked at first; exports can afford to wait.
        packing.refuse_bad_codes(codes)
        return native.pack2(codes)  # type: ignore[no-any-return]


def _choose(tensors: Sequence[torch.Tensor], grid: str) -> Kernels:
    if not (enabled and grid in GRIDS and is_loaded()):
        return REFERENCE
    plain = all(native.has_plain_format(tensor) for tensor in tensors)
    return _KERNELS if plain else REFERENCE


_KERNELS = _CompiledKernels()
OPERATORS = Operators(_choose)


def is_loaded() -> bool:
    """Load the compiled module once torch_npu is there; tell whether it is usable."""
    global native, load_error, device, _tried
    if _tried or "torch_npu" not in sys.modules:
        return native is not None
    _tried = True
    try:
        module = importlib.import_module("megatron_bitcpm._npu")
        missing = [name for name in _FUNCTIONS if not hasattr(module, name)]
        if missing:
            raise ImportError(f"built from another version, without {', '.join(missing)}")
        device = dict(module.describe_device())
        native = module
    except Exception as error:  # whatever a broken build raises, the reference still works
        load_error = one_line(f"{type(error).__name__}: {error}", limit=2000)
        logging.getLogger(__name__).warning(
            "no compiled NPU operators (%s): using the pure-torch reference, slower, equal bits",
            load_error,
        )
    return native is not None


def describe_details() -> dict[str, Any]:
    """Return what only an NPU has to report: its description by the driver."""
    return {"device": device}


def register() -> None:
    """Register the kernels for PrivateUse1, torch_npu's device."""
    for name in NAMES:
        LIBRARY.impl(name, getattr(OPERATORS, name), "PrivateUse1")
