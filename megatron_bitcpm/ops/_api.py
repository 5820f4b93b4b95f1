"""The operators as functions: arguments, results, refusals. Imported through `megatron_bitcpm.ops`.

The same weight gives the same bits on every backend. `w` is a latent weight [O, I], float32,
bfloat16 or float16; groups of `group_size` inputs share a scale, -1 is the whole row; `eps` is the
smallest scale; `grid` names the levels. Numerics: docs/quantizer.md. Functional forms take any
strides and return contiguous tensors (an input that is not contiguous is copied first).

Shape legend: O out, I in, G groups per row, P packed bytes per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.grids import TERNARY
from megatron_bitcpm.quant.scales import DEFAULT_EPS

LARGEST_INTEGER = 2**63  # of a torch operator's arguments


def fake_quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> torch.Tensor:
    """Quantise a latent weight and return its values on the grid, gradient straight through.

    Args:
        w: latent weight, [O, I], float32/bfloat16/float16, any device.
        group_size: inputs per scale; must divide I; -1 means I.
        eps: smallest scale, in units of w.
        grid: "ternary", "asym4", "half_sym4", "int_sym4" or "five".
    Returns:
        wq: level * scale, [O, I], dtype of w, contiguous; in a group at most as many values as the
        grid has levels. NaN in groups that hold a non-finite value.
    Raises:
        BitcpmError: wrong dtype, shape, group size, eps or grid.
    Gradient: d loss / d w = d loss / d wq.
    Source: BitCPM-CANN technical report, section 3.1, eqs. 1-2.
    """
    _require_tensor(w, "w")
    _require_settings(group_size, eps, grid)
    return cast(torch.Tensor, torch.ops.bitcpm.fake_quantize.default(w, group_size, eps, grid))


def quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a latent weight to codes and scales; arguments as `fake_quantize`, no gradient.

    Returns:
        codes: int8, [O, I], the levels themselves; for half_sym4 twice the levels: -3, -1, 1, 3.
        scales: float32, units of w, [O, G]; NaN, with codes 0, for groups that hold a non-finite
        value.
    """
    _require_tensor(w, "w")
    _require_settings(group_size, eps, grid)
    result = torch.ops.bitcpm.quantize.default(w, group_size, eps, grid)
    return cast(tuple[torch.Tensor, torch.Tensor], result)


def abs_sums(w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """Sum absolute values per group in the canonical order: float32, [O, G], no gradient."""
    _require_tensor(w, "w")
    _require_settings(group_size)
    return cast(torch.Tensor, torch.ops.bitcpm.abs_sums.default(w, group_size))


def fake_quantize_with_scales(
    w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """Return wq of w under given scales, gradient straight through to w, none to the scales.

    Args:
        w: latent weight, [O, I], float32/bfloat16/float16.
        scales: float32, units of w, [O, G], G a divisor of I, on the device of w.
        grid: as for `fake_quantize`.
    Returns:
        wq, [O, I], dtype of w. NaN where w is not finite, and in the whole group where the scale is
        not positive and finite.
    """
    _require_tensor(w, "w")
    _require_tensor(scales, "scales")
    _require_settings(grid=grid)
    result = torch.ops.bitcpm.fake_quantize_with_scales.default(w, scales, grid)
    return cast(torch.Tensor, result)


def fake_quantize_(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> torch.Tensor:
    """Overwrite w with its values on the grid and return it; arguments as `fake_quantize`.

    Not recorded by autograd: call it under ``torch.no_grad()`` on tensors that require a gradient.
    Not idempotent: call it once per value of the latent weight. Any strides, but elements that
    share memory are refused.
    """
    _require_tensor(w, "w")
    _require_settings(group_size, eps, grid)
    if w.requires_grad or w.is_inference():
        _refuse_recording([w])
    torch.ops.bitcpm.fake_quantize_.default(w, group_size, eps, grid)
    return w


def fake_quantize_with_scales_(
    w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """Overwrite w with wq under given scales and return it; see `fake_quantize_`."""
    _require_tensor(w, "w")
    _require_tensor(scales, "scales")
    _require_settings(grid=grid)
    if w.requires_grad or w.is_inference():
        _refuse_recording([w])
    torch.ops.bitcpm.fake_quantize_with_scales_.default(w, scales, grid)
    return w


def foreach_fake_quantize_(
    ws: Iterable[torch.Tensor],
    group_size: int = -1,
    eps: float = DEFAULT_EPS,
    grid: str = TERNARY,
) -> None:
    """Overwrite each weight with its values on the grid: one kernel call for a whole model.

    Args:
        ws: latent weights of one device; types and shapes may differ, `group_size` divides each I.
            A weight given twice, and weights that share memory, are refused.
        group_size: as for `fake_quantize`, and so are eps and grid.
    Raises:
        BitcpmError: as `fake_quantize_`; then no weight is changed.
    """
    weights = _to_list(ws, "ws", "w")
    _require_settings(group_size, eps, grid)
    if weights:
        _refuse_recording(weights)
        torch.ops.bitcpm.foreach_fake_quantize_.default(weights, group_size, eps, grid)


def foreach_fake_quantize_with_scales_(
    ws: Iterable[torch.Tensor], scales: Iterable[torch.Tensor], grid: str = TERNARY
) -> None:
    """Overwrite each weight with wq under its scales; see `foreach_fake_quantize_`.

    Args:
        ws: latent weights.
        scales: for each weight its float32 scales, [O, G]; G may differ from weight to weight.
        grid: as for `fake_quantize`.
    """
    weights, given = _to_list(ws, "ws", "w"), _to_list(scales, "scales", "scales")
    _require_settings(grid=grid)
    if weights or given:
        _refuse_recording(weights)
        torch.ops.bitcpm.foreach_fake_quantize_with_scales_.default(weights, given, grid)


def pack2(codes: torch.Tensor) -> torch.Tensor:
    """Pack ternary codes into two bits each; layout in docs/quantizer.md.

    Args:
        codes: int8 in {-1, 0, 1}, [O, I].
    Returns:
        packed: uint8, [O, 32 * ceil(I / 128)].
    Raises:
        BitcpmError: wrong dtype or shape, or another code: names the first row that holds one.
    """
    _require_tensor(codes, "codes")
    return cast(torch.Tensor, torch.ops.bitcpm.pack2.default(codes))


def unpack2(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return the codes, int8 [O, in_features], that `pack2` packed.

    Raises:
        BitcpmError: wrong dtype or shape, or bytes that pack2 does not write: names the first row.
    """
    _require_tensor(packed, "packed")
    if type(in_features) is not int:
        _require_integer(in_features, "in_features", "Pass the inputs of the codes")
    return cast(torch.Tensor, torch.ops.bitcpm.unpack2.default(packed, in_features))


def int8_per_token(x: torch.Tensor) -> torch.Tensor:
    """Round activations to 256 levels per token, gradient straight through.

    Args:
        x: activations, [..., I], float32/bfloat16/float16; a token is the last dimension.
    Returns:
        x_q, contiguous, shape and dtype of x. NaN in tokens that hold a non-finite value.
    Raises:
        BitcpmError: wrong dtype, or no dimension.
    Gradient: d loss / d x = d loss / d x_q.
    Source: transformers.integrations.bitnet.
    """
    _require_tensor(x, "x")
    return cast(torch.Tensor, torch.ops.bitcpm.int8_per_token.default(x))


def _refuse_recording(ws: Sequence[torch.Tensor]) -> None:
    if torch.is_grad_enabled() and any(w.requires_grad for w in ws):
        raise BitcpmError(
            "w.requires_grad=True: autograd cannot record this. Call it under torch.no_grad()."
        )
    if not torch.is_inference_mode_enabled() and any(w.is_inference() for w in ws):
        raise BitcpmError("w.is_inference=True: it changes only in inference mode. Pass a clone.")


def _require_tensor(x: Any, name: str) -> None:
    # torch's own answer to another type is several lines long.
    if not isinstance(x, torch.Tensor):
        shown = None if x is None else type(x).__name__
        raise BitcpmError(f"{name}={shown}: must be a tensor. Pass a torch.Tensor.")


def _require_settings(group_size: Any = -1, eps: Any = DEFAULT_EPS, grid: Any = TERNARY) -> None:
    # Plain types first: this runs in every call.
    if type(group_size) is not int or group_size >= LARGEST_INTEGER:
        _require_integer(group_size, "group_size", "Use 64, or -1 for the whole row")
    if type(eps) is not float and (isinstance(eps, bool) or not isinstance(eps, int | float)):
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
    what = "weights" if name == "ws" else "scales"
    if isinstance(tensors, torch.Tensor):
        shape = list(tensors.shape)
        raise BitcpmError(f"{name}={shape}: must be a list of {what}. Pass [{member}].")
    if not isinstance(tensors, Iterable):
        shown = None if tensors is None else type(tensors).__name__
        raise BitcpmError(f"{name}={shown}: must be a list of {what}. Pass [{member}].")
    members = list(tensors)
    for index, x in enumerate(members):
        _require_tensor(x, f"{name}[{index}]")
    return members
