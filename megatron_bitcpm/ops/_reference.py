"""The operators in pure torch, for every device that has no kernel of its own.

Registered as CompositeExplicitAutograd, so a device's kernel takes precedence where there is one.
The mathematics is `megatron_bitcpm.quant.ternary`; here are only checks and the in-place forms.
"""

from __future__ import annotations

import torch

from megatron_bitcpm.ops._schema import LIBRARY, check_weight, check_weight_and_scales
from megatron_bitcpm.quant import ternary


@torch.no_grad()
def fake_quantize(w: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize`."""
    check_weight(w)
    return ternary.fake_quantize(w, group_size, eps)


@torch.no_grad()
def quantize(w: torch.Tensor, group_size: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `megatron_bitcpm.ops.quantize`."""
    check_weight(w)
    return ternary.quantize(w, group_size, eps)


@torch.no_grad()
def abs_sums(w: torch.Tensor, group_size: int) -> torch.Tensor:
    """See `megatron_bitcpm.ops.abs_sums`."""
    check_weight(w)
    return ternary.abs_sums(w, group_size)


@torch.no_grad()
def fake_quantize_with_scales(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales`."""
    check_weight_and_scales(w, scales)
    return ternary.fake_quantize_with_scales(w, scales)


@torch.no_grad()
def fake_quantize_(w: torch.Tensor, group_size: int, eps: float) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_`."""
    w.copy_(fake_quantize(w, group_size, eps))


@torch.no_grad()
def fake_quantize_with_scales_(w: torch.Tensor, scales: torch.Tensor) -> None:
    """See `megatron_bitcpm.ops.fake_quantize_with_scales_`."""
    w.copy_(fake_quantize_with_scales(w, scales))


KERNELS = {
    "fake_quantize": fake_quantize,
    "quantize": quantize,
    "abs_sums": abs_sums,
    "fake_quantize_with_scales": fake_quantize_with_scales,
    "fake_quantize_": fake_quantize_,
    "fake_quantize_with_scales_": fake_quantize_with_scales_,
}


def register() -> None:
    """Register the kernels for every device; called once, by `megatron_bitcpm.ops`."""
    for name, kernel in KERNELS.items():
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
