"""The operators in pure torch, for every device that has no kernel of its own.

Registered as CompositeExplicitAutograd, so a device's kernel takes precedence where there is one.
The mathematics is `megatron_bitcpm.quant`; here are only checks and the in-place forms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_bitcpm.ops import _checks
from megatron_bitcpm.ops._schema import LIBRARY
from megatron_bitcpm.quant import activation, fake_quant, packing
from megatron_bitcpm.quant import scales as scale_rules
from megatron_bitcpm.quant.grids import TERNARY, find_grid
from megatron_bitcpm.quant.groups import resolve_group_size
from megatron_bitcpm.quant.scales import DEFAULT_EPS, check_eps


@torch.no_grad()
def fake_quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize`."""
    _checks.check_weight(w)
    return fake_quant.fake_quantize(w, group_size, eps, grid)


@torch.no_grad()
def quantize(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `megatron_bitcpm.ops.quantize`."""
    _checks.check_weight(w)
    return fake_quant.quantize(w, group_size, eps, grid)


@torch.no_grad()
def abs_sums(w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """See `megatron_bitcpm.ops.abs_sums`."""
    _checks.check_weight(w)
    return scale_rules.abs_sums(w, group_size)


@torch.no_grad()
def fake_quantize_with_scales(
    w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales`."""
    _checks.check_weight_and_scales(w, scales)
    return fake_quant.fake_quantize_with_scales(w, scales, grid)


@torch.no_grad()
def fake_quantize_(
    w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_`."""
    _checks.check_weight(w)
    _checks.check_written([w])
    w.copy_(fake_quantize(w, group_size, eps, grid))


@torch.no_grad()
def fake_quantize_with_scales_(w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales_`."""
    _checks.check_weight_and_scales(w, scales)
    _checks.check_written([w], [scales])
    w.copy_(fake_quantize_with_scales(w, scales, grid))


@torch.no_grad()
def foreach_fake_quantize_(
    ws: Sequence[torch.Tensor],
    group_size: int = -1,
    eps: float = DEFAULT_EPS,
    grid: str = TERNARY,
) -> None:
    """See `megatron_bitcpm.ops.foreach_fake_quantize_`."""
    check_list(ws, group_size, eps, grid)
    for w in ws:
        w.copy_(fake_quantize(w, group_size, eps, grid))


@torch.no_grad()
def foreach_fake_quantize_with_scales_(
    ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], grid: str = TERNARY
) -> None:
    """See `megatron_bitcpm.ops.foreach_fake_quantize_with_scales_`."""
    check_list_and_scales(ws, scales, grid)
    for w, scales_OG in zip(ws, scales, strict=True):
        w.copy_(fake_quantize_with_scales(w, scales_OG, grid))


@torch.no_grad()
def pack2(codes: torch.Tensor) -> torch.Tensor:
    """See `megatron_bitcpm.ops.pack2`."""
    _checks.check_codes(codes)
    return packing.pack2(codes)


@torch.no_grad()
def unpack2(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """See `megatron_bitcpm.ops.unpack2`."""
    _checks.check_packed(packed, in_features)
    return packing.unpack2(packed, in_features)


@torch.no_grad()
def int8_per_token(x: torch.Tensor) -> torch.Tensor:
    """See `megatron_bitcpm.ops.int8_per_token`."""
    _checks.check_activation(x)
    return activation.int8_per_token(x).contiguous()


def check_list(ws: Sequence[torch.Tensor], group_size: int, eps: float, grid: str) -> None:
    """Raise BitcpmError unless every one of ws can be quantised in place: all or nothing."""
    _checks.check_list(ws)
    check_eps(eps)
    find_grid(grid)
    for index, w in enumerate(ws):
        resolve_group_size(w.shape[1], group_size, f"ws[{index}].group_size")
    _checks.check_written(ws)


def check_list_and_scales(
    ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], grid: str
) -> None:
    """Raise BitcpmError unless every one of ws can be quantised with its scales in place."""
    _checks.check_list(ws, scales)
    find_grid(grid)
    _checks.check_written(ws, scales)


def store(w: torch.Tensor, flat: torch.Tensor) -> None:
    """End an in-place form that a kernel ran on `flat`, which is w or a contiguous copy of it."""
    if flat is w:
        # Autograd must notice that a tensor it saved has changed behind its back.
        torch.autograd.graph.increment_version(w)
    else:
        with torch.no_grad():
            w.copy_(flat)


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


def register() -> None:
    """Register the kernels for every device; called once, by `megatron_bitcpm.ops`."""
    for name, kernel in KERNELS.items():
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
