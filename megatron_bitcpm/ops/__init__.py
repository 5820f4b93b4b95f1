"""Layer 2: the ternary quantiser as torch operators, one contract and a backend per device.

    fake_quantize(w)   -> wq               what a ternary linear multiplies with; straight-through
    quantize(w)        -> codes, scales    what exports store
    abs_sums(w)        -> sums             for scales that span shards: gather, add, then
    scales_from_sums(sums, n) and fake_quantize_with_scales(w, scales)
    fake_quantize_(w), fake_quantize_with_scales_(w, scales)     the same in place

The same weight gives the same bits on every backend. `w` is a latent weight [O, I], float32,
bfloat16 or float16; groups of `group_size` inputs share a scale, -1 is the whole row; `eps` is the
smallest scale. Numerics: `megatron_bitcpm.quant.ternary` and docs/quantizer.md. Functional forms
take any strides and return contiguous tensors (a non-contiguous weight is copied first).

The only importer of compiled modules. Without them everything runs on the pure-torch reference and
one warning says so; `backend_report` tells which backend is live and why.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from megatron_bitcpm.config import env_cpu_isa
from megatron_bitcpm.errors import BackendError, BitcpmError
from megatron_bitcpm.ops import _cpu, _reference, _schema
from megatron_bitcpm.quant.ternary import DEFAULT_EPS, scales_from_sums

__all__ = [
    "abs_sums",
    "backend_report",
    "fake_quantize",
    "fake_quantize_",
    "fake_quantize_with_scales",
    "fake_quantize_with_scales_",
    "quantize",
    "scales_from_sums",
    "use_backend",
]

_schema.register()
_reference.register()
_cpu.register(env_cpu_isa())
if _cpu.load_error:
    logging.getLogger(__name__).warning(
        "no compiled CPU operators (%s): using the pure-torch reference, slower, equal bits",
        _cpu.load_error,
    )

_requested = "auto"


def fake_quantize(w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """Quantise a latent weight and return its ternary values, gradient straight through.

    Args:
        w: latent weight, [O, I], float32/bfloat16/float16, any device.
        group_size: inputs per scale; must divide I; -1 means I.
        eps: smallest scale, in units of w.
    Returns:
        wq: code * scale, [O, I], dtype of w, contiguous; at most three values per group. NaN in
        groups that hold a non-finite value.
    Raises:
        BitcpmError: wrong dtype, shape, group size or eps.
    Gradient: d loss / d w = d loss / d wq.
    Source: BitCPM-CANN technical report, section 3.1, eqs. 1-2.
    """
    return torch.ops.bitcpm.fake_quantize.default(w, group_size, eps)  # type: ignore[no-any-return]


def quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a latent weight to codes and scales; arguments as `fake_quantize`, no gradient.

    Returns:
        codes: int8 in {-1, 0, 1}, [O, I].  scales: float32, units of w, [O, G]; NaN, with codes 0,
        for groups that hold a non-finite value.
    """
    return torch.ops.bitcpm.quantize.default(w, group_size, eps)  # type: ignore[no-any-return]


def abs_sums(w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """Sum absolute values per group in the canonical order: float32, [O, G], no gradient."""
    return torch.ops.bitcpm.abs_sums.default(w, group_size)  # type: ignore[no-any-return]


def fake_quantize_with_scales(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return wq of w under given scales, gradient straight through to w, none to the scales.

    Args:
        w: latent weight, [O, I], float32/bfloat16/float16.
        scales: float32, units of w, [O, G], G a divisor of I, on the device of w.
    Returns:
        wq, [O, I], dtype of w. NaN where w is not finite, and in the whole group where the scale is
        not positive and finite.
    """
    return torch.ops.bitcpm.fake_quantize_with_scales.default(w, scales)  # type: ignore[no-any-return]


def fake_quantize_(w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """Overwrite w with its ternary values and return it; arguments as `fake_quantize`.

    Not recorded by autograd: call it under ``torch.no_grad()`` on tensors that require a gradient.
    Not idempotent: call it once per value of the latent weight. Any strides.
    """
    _refuse_recording(w)
    torch.ops.bitcpm.fake_quantize_.default(w, group_size, eps)
    return w


def fake_quantize_with_scales_(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Overwrite w with wq under given scales and return it; see `fake_quantize_`."""
    _refuse_recording(w)
    torch.ops.bitcpm.fake_quantize_with_scales_.default(w, scales)
    return w


def _refuse_recording(w: torch.Tensor) -> None:
    if w.requires_grad and torch.is_grad_enabled():
        raise BitcpmError.of(
            "w.requires_grad", True, "autograd cannot record this", "Call it under torch.no_grad()"
        )


def use_backend(name: str, device_type: str = "cpu") -> None:
    """Choose the implementation, the configuration value `quant.backend`.

    Args:
        name: "auto" (a device's compiled kernels where there are any), "reference" (pure torch
            everywhere), "native" (compiled kernels, an error where there are none).
        device_type: where the weights are: "cpu", "cuda", "npu"; "native" must hold there.
    Raises:
        BackendError: compiled kernels were asked for and did not load, or there are none for this
            device, or the name is unknown.
    """
    global _requested
    if name not in ("auto", "reference", "native"):
        raise BackendError.of(
            "quant.backend", name, "is no backend", "Use auto, reference or native"
        )
    if name == "native" and device_type != "cpu":
        raise BackendError.of(
            "quant.backend", name, f"there are no compiled operators for {device_type}", "Use auto"
        )
    if name == "native" and _cpu.native is None:
        raise BackendError.of(
            "quant.backend",
            name,
            f"the compiled CPU operators did not load ({_cpu.load_error})",
            "Reinstall with a C++ compiler, or use auto",
        )
    _requested = name
    _cpu.enabled = name != "reference"


def backend_report() -> dict[str, Any]:
    """Say which implementation each device has, and why; JSON-able.

    Returns:
        requested: argument of the last `use_backend`.  cpu: backend ("native" or "reference"), isa,
        reason, load_error.  other: the same for every other device.
    """
    live = _cpu.native is not None and _cpu.enabled
    if live:
        reason = "compiled module loaded"
    elif _cpu.native is None:
        reason = "compiled module did not load"
    else:
        reason = "quant.backend=reference"
    return {
        "requested": _requested,
        "cpu": {
            "backend": "native" if live else "reference",
            "isa": _cpu.isa if live else None,
            "reason": reason,
            "load_error": _cpu.load_error,
        },
        "other": {"backend": "reference", "reason": "no compiled kernels for other devices"},
    }
