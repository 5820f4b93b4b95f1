"""The operators as functions: arguments, results, refusals. Imported through `megatron_bitcpm.ops`.

The same weight gives the same bits on every backend. Numerics: docs/quantizer.md.

    w           latent weight, [O, I], float32, bfloat16 or float16, on any device
    group_size  inputs that share a scale, a divisor of I; -1 is the whole row
    eps         smallest scale, in units of w
    grid        name of the levels, see `megatron_bitcpm.quant.grids`
    scales      float32, units of w, [O, G], G a divisor of I, on the device of w
    codes       int8, [O, I]: the levels; for half_sym4 twice the levels
    packed      uint8, [O, P], two bits per ternary code, P = 32 * ceil(I / 128)

Arguments of another type, shape or range raise BitcpmError. Functional forms take any strides and
return contiguous tensors. Gradients are straight through: d loss / d w = d loss / d wq.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.grids import TERNARY
from megatron_bitcpm.quant.settings import DEFAULT_EPS

LARGEST_INTEGER = 2**63  # of a torch operator's arguments


def fake_quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> torch.Tensor:
    """Return wq, level * scale in the dtype of w, [O, I]; NaN in groups with a non-finite value.

    Source: BitCPM-CANN technical report, section 3.1, eqs. 1-2.
    """
    _require_tensors(w=w)
    _require_settings(group_size, eps, grid)
    return cast(torch.Tensor, torch.ops.bitcpm.fake_quantize.default(w, group_size, eps, grid))


def quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of w, no gradient; 0 and NaN in groups with a non-finite value."""
    _require_tensors(w=w)
    _require_settings(group_size, eps, grid)
    result = torch.ops.bitcpm.quantize.default(w, group_size, eps, grid)
    return cast(tuple[torch.Tensor, torch.Tensor], result)


def abs_sums(w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """Sum absolute values per group in the canonical order: float32, [O, G], no gradient."""
    _require_tensors(w=w)
    _require_settings(group_size)
    return cast(torch.Tensor, torch.ops.bitcpm.abs_sums.default(w, group_size))


def fake_quantize_with_scales(
    w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """Return wq of w under given scales, which get no gradient.

    NaN where w is not finite, and in the whole group where the scale is not positive and finite.
    """
    _require_tensors(w=w, scales=scales)
    _require_settings(grid=grid)
    result = torch.ops.bitcpm.fake_quantize_with_scales.default(w, scales, grid)
    return cast(torch.Tensor, result)


def fake_quantize_(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> torch.Tensor:
    """Overwrite w with the wq of `fake_quantize` and return it.

    Not recorded by autograd: call it under ``torch.no_grad()`` on tensors that require a gradient.
    Not idempotent: call it once per value of the latent weight. Any strides, but elements that
    share memory are refused.
    """
    _require_tensors(w=w)
    _require_settings(group_size, eps, grid)
    _refuse_recording([w])
    torch.ops.bitcpm.fake_quantize_.default(w, group_size, eps, grid)
    return w


def fake_quantize_with_scales_(
    w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """Overwrite w with wq under given scales and return it; see `fake_quantize_`."""
    _require_tensors(w=w, scales=scales)
    _require_settings(grid=grid)
    _refuse_recording([w])
    torch.ops.bitcpm.fake_quantize_with_scales_.default(w, scales, grid)
    return w


def foreach_fake_quantize_(
    ws: Iterable[torch.Tensor],
    group_size: int = -1,
    eps: float = DEFAULT_EPS,
    grid: str = TERNARY,
) -> None:
    """Overwrite each weight as `fake_quantize_` does: one kernel call for a whole model.

    Weights are of one device; their types and shapes may differ. One that is given twice, or shares
    memory with another, is refused. After a refusal no weight is changed.
    """
    weights = _to_list(ws, "ws", "w")
    _require_settings(group_size, eps, grid)
    if weights:
        _refuse_recording(weights)
        torch.ops.bitcpm.foreach_fake_quantize_.default(weights, group_size, eps, grid)


def foreach_fake_quantize_with_scales_(
    ws: Iterable[torch.Tensor], scales: Iterable[torch.Tensor], grid: str = TERNARY
) -> None:
    """Overwrite each weight with wq under its scales, of any G; see `foreach_fake_quantize_`."""
    weights, given = _to_list(ws, "ws", "w"), _to_list(scales, "scales", "scales")
    _require_settings(grid=grid)
    if weights or given:
        _refuse_recording(weights)
        torch.ops.bitcpm.foreach_fake_quantize_with_scales_.default(weights, given, grid)


def pack2(codes: torch.Tensor) -> torch.Tensor:
    """Pack ternary codes; the error for another code names the first row that holds one."""
    _require_tensors(codes=codes)
    return cast(torch.Tensor, torch.ops.bitcpm.pack2.default(codes))


def unpack2(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return the codes that `pack2` packed; the error for other bytes names the first row."""
    _require_tensors(packed=packed)
    _require_integer(in_features, "in_features", "Pass the inputs of the codes")
    return cast(torch.Tensor, torch.ops.bitcpm.unpack2.default(packed, in_features))


def int8_per_token(x: torch.Tensor) -> torch.Tensor:
    """Round activations [..., I], types as of w, to 256 levels per token; shape and dtype of x.

    A token is the last dimension; NaN in tokens that hold a non-finite value.
    Source: transformers.integrations.bitnet.
    """
    _require_tensors(x=x)
    return cast(torch.Tensor, torch.ops.bitcpm.int8_per_token.default(x))


def _refuse_recording(ws: Sequence[torch.Tensor]) -> None:
    for w in ws:
        if w.requires_grad and torch.is_grad_enabled():
            raise BitcpmError(
                "w.requires_grad=True: autograd cannot record this. Call it under torch.no_grad()."
            )
        if w.is_inference() and not torch.is_inference_mode_enabled():
            raise BitcpmError(
                "w.is_inference=True: it changes only in inference mode. Pass a clone."
            )


def _require_tensors(**tensors: Any) -> None:
    # torch's own answer to another type is several lines long.
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise BitcpmError(f"{name}={_name_type(x)}: must be a tensor. Pass a torch.Tensor.")


def _name_type(x: Any) -> str:
    return "None" if x is None else type(x).__name__


def _require_settings(group_size: Any = -1, eps: Any = DEFAULT_EPS, grid: Any = TERNARY) -> None:
    _require_integer(group_size, "group_size", "Use 64, or -1 for the whole row")
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise BitcpmError(f"eps={eps!r}: must be a number. Use 1e-5.")
    if not isinstance(grid, str):
        raise BitcpmError(f"grid={grid!r}: must be a name. Use ternary.")


def _require_integer(value: Any, name: str, fix: str) -> None:
    if isinstance(value, torch.SymInt):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise BitcpmError(f"{name}={value!r}: must be an integer. {fix}.")
    if abs(value) >= LARGEST_INTEGER:
        raise BitcpmError(f"{name}={value}: is larger than any tensor. Use a smaller one.")


def _to_list(tensors: Any, name: str, member: str) -> list[torch.Tensor]:
    """Return the members of a list, which may be any iterable but a tensor."""
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Iterable):
        what = "weights" if name == "ws" else "scales"
        is_tensor = isinstance(tensors, torch.Tensor)
        shown = list(tensors.shape) if is_tensor else _name_type(tensors)
        raise BitcpmError(f"{name}={shown}: must be a list of {what}. Pass [{member}].")
    members = list(tensors)
    _require_tensors(**{f"{name}[{index}]": x for index, x in enumerate(members)})
    return members
