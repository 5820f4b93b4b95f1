"""The operators on an Ascend NPU: the compiled module `megatron_bitcpm._npu` behind the contract.

The kernels are for the ternary grid. Everything else runs the reference there, which gives the same
bits: the other grids, `unpack2`, `int8_per_token`, weights in a private format of torch_npu, and
every operator where the module did not load. A weight that is not contiguous is copied; the
in-place forms copy the result back. No operator but `pack2` waits for the device.

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

from megatron_bitcpm.ops import _checks, _reference
from megatron_bitcpm.ops._schema import LIBRARY
from megatron_bitcpm.quant.grids import TERNARY, find_grid
from megatron_bitcpm.quant.groups import resolve_group_size
from megatron_bitcpm.quant.packing import describe_bad_code
from megatron_bitcpm.quant.scales import DEFAULT_EPS, check_eps

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

# The grids the kernels know.
GRIDS = (TERNARY,)

native: Any = None
load_error: str | None = None
device: dict[str, int] | None = None
# Set by ops.use_backend: False sends NPUs to the reference although the module is there.
enabled = True
_tried = False


def fake_quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize`."""
    if not _can_run([w], grid):
        return _reference.fake_quantize(w, group_size, eps, grid)
    flat, group_len = _prepare(w, group_size, eps)
    return native.fake_quantize(flat, group_len, eps)  # type: ignore[no-any-return]


def quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `megatron_bitcpm.ops.quantize`."""
    if not _can_run([w], grid):
        return _reference.quantize(w, group_size, eps, grid)
    flat, group_len = _prepare(w, group_size, eps)
    return native.quantize(flat, group_len, eps)  # type: ignore[no-any-return]


def abs_sums(w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """See `megatron_bitcpm.ops.abs_sums`."""
    if not _can_run([w], TERNARY):
        return _reference.abs_sums(w, group_size)
    flat, group_len = _prepare(w, group_size, DEFAULT_EPS)
    return native.abs_sums(flat, group_len)  # type: ignore[no-any-return]


def fake_quantize_with_scales(
    w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales`."""
    if not _can_run([w, scales], grid):
        return _reference.fake_quantize_with_scales(w, scales, grid)
    _checks.check_weight_and_scales(w, scales)
    return native.fake_quantize_with_scales(  # type: ignore[no-any-return]
        w.contiguous(), scales.contiguous()
    )


def fake_quantize_(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_`."""
    if not _can_run([w], grid):
        return _reference.fake_quantize_(w, group_size, eps, grid)
    flat, group_len = _prepare(w, group_size, eps)
    _checks.check_written([w])
    native.fake_quantize_list([flat], [group_len], eps)
    _reference.store(w, flat)


def fake_quantize_with_scales_(w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales_`."""
    if not _can_run([w, scales], grid):
        return _reference.fake_quantize_with_scales_(w, scales, grid)
    _checks.check_weight_and_scales(w, scales)
    _checks.check_written([w], [scales])
    flat = w.contiguous()
    native.fake_quantize_with_scales_list([flat], [scales.contiguous()])
    _reference.store(w, flat)


def foreach_fake_quantize_(
    ws: Sequence[torch.Tensor],
    group_size: int = -1,
    eps: float = DEFAULT_EPS,
    grid: str = TERNARY,
) -> None:
    """See `megatron_bitcpm.ops.foreach_fake_quantize_`."""
    if not _can_run(ws, grid):
        return _reference.foreach_fake_quantize_(ws, group_size, eps, grid)
    _reference.check_list(ws, group_size, eps, grid)
    flats = [w.contiguous() for w in ws]
    lengths = [_group_len(w, group_size) for w in ws]
    native.fake_quantize_list(flats, lengths, eps)
    for w, flat in zip(ws, flats, strict=True):
        _reference.store(w, flat)


def foreach_fake_quantize_with_scales_(
    ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], grid: str = TERNARY
) -> None:
    """See `megatron_bitcpm.ops.foreach_fake_quantize_with_scales_`."""
    if not _can_run([*ws, *scales], grid):
        return _reference.foreach_fake_quantize_with_scales_(ws, scales, grid)
    _reference.check_list_and_scales(ws, scales, grid)
    flats = [w.contiguous() for w in ws]
    native.fake_quantize_with_scales_list(flats, [scales_OG.contiguous() for scales_OG in scales])
    for w, flat in zip(ws, flats, strict=True):
        _reference.store(w, flat)


def pack2(codes: torch.Tensor) -> torch.Tensor:
    """See `megatron_bitcpm.ops.pack2`."""
    if not _can_run([codes], TERNARY):
        return _reference.pack2(codes)
    _checks.check_codes(codes)
    # A kernel cannot raise, so the codes are looked at first; exports can afford to wait for it.
    bad_O = ((codes < -1) | (codes > 1)).any(1)
    if bad_O.any():
        raise describe_bad_code(codes, int(bad_O.nonzero()[0]))
    return native.pack2(codes.contiguous())  # type: ignore[no-any-return]


def _can_run(tensors: Sequence[torch.Tensor], grid: str) -> bool:
    """Tell whether the kernels take this; arguments that are wrong go to the reference, too."""
    find_grid(grid)
    if not (enabled and grid in GRIDS and _load()):
        return False
    return all(native.has_plain_format(tensor) for tensor in tensors)


def _prepare(w: torch.Tensor, group_size: int, eps: float) -> tuple[torch.Tensor, int]:
    _checks.check_weight(w)
    check_eps(eps)
    return w.contiguous(), _group_len(w, group_size)


def _group_len(w: torch.Tensor, group_size: int) -> int:
    # An empty row has no groups, whatever their length; the module wants a length above zero.
    return resolve_group_size(w.shape[1], group_size) or 1


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
}


def _load() -> bool:
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
        load_error = " ".join(f"{type(error).__name__}: {error}".split())
        logging.getLogger(__name__).warning(
            "no compiled NPU operators (%s): using the pure-torch reference, slower, equal bits",
            load_error,
        )
    return native is not None


def unavailable_reason() -> str | None:
    """Return why `quant.backend: native` cannot be had on an NPU, or None."""
    if _load():
        return None
    if load_error is None:
        return "torch_npu is not imported in this process"
    return f"the compiled NPU operators did not load ({load_error})"


def list_compiled() -> dict[str, list[str]]:
    """Return the operators and grids that the compiled module has, by "ops" and "grids"."""
    return {"ops": sorted(KERNELS), "grids": list(GRIDS)}


def report() -> dict[str, Any]:
    """Say which implementation an NPU has, and why; part of `ops.backend_report`."""
    live = _load() and enabled
    if live:
        reason = "compiled module loaded"
    elif native is not None:
        reason = "quant.backend=reference"
    elif load_error is not None:
        reason = "compiled module did not load"
    else:
        reason = "torch_npu is not imported in this process"
    return {
        "backend": "native" if live else "reference",
        "reason": reason,
        "load_error": load_error,
        "device": device,
        **(list_compiled() if live else {"ops": [], "grids": []}),
    }


def register() -> None:
    """Register the kernels for PrivateUse1, torch_npu's device; called once, by the package."""
    for name, kernel in KERNELS.items():
        LIBRARY.impl(name, kernel, "PrivateUse1")
