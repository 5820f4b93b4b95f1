"""The operators' contract: names and types, what they refuse, their fakes and their gradients.

Backends (`_reference`, `_cpu`) only fill these definitions in. What the operators compute is in
`megatron_bitcpm.quant.ternary` and docs/quantizer.md.

Gradient: straight-through, d loss / d w = d loss / d wq, registered as a formula of the operator.
The forward value is exactly wq; ``w + (wq - w).detach()`` would leave the grid in 1 to 4 % of the
entries, because that sum rounds.

Shape legend: O out, I in, G groups per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_bitcpm.errors import BitcpmError, format_problem
from megatron_bitcpm.quant.groups import count_groups
from megatron_bitcpm.quant.ternary import check_eps

LIBRARY: Any = torch.library.Library("bitcpm", "DEF")  # type: ignore[no-untyped-call]

SCHEMAS = {
    "fake_quantize": "(Tensor w, int group_size, float eps) -> Tensor",
    "quantize": "(Tensor w, int group_size, float eps) -> (Tensor codes, Tensor scales)",
    "abs_sums": "(Tensor w, int group_size) -> Tensor",
    "fake_quantize_with_scales": "(Tensor w, Tensor scales) -> Tensor",
    "fake_quantize_": "(Tensor(a!) w, int group_size, float eps) -> ()",
    "fake_quantize_with_scales_": "(Tensor(a!) w, Tensor scales) -> ()",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

for _name, _signature in SCHEMAS.items():
    LIBRARY.define(_name + _signature)


def find_weight_problem(w: torch.Tensor) -> str | None:
    """Return what is wrong with w as a latent weight, one line, or None."""
    if w.dtype not in DTYPES:
        return format_problem(
            "w.dtype", w.dtype, "must be float32, bfloat16 or float16", "Convert the weight first"
        )
    if w.dim() != 2:
        return format_problem(
            "w.shape", list(w.shape), "must be [out, in]", "Reshape the weight to two dimensions"
        )
    return None


def find_scales_problem(w: torch.Tensor, scales: torch.Tensor) -> str | None:
    """Return what is wrong with scales_OG for w, one line, or None."""
    if scales.dtype != torch.float32:
        return format_problem(
            "scales.dtype", scales.dtype, "must be float32", "Take them from scales_from_sums"
        )
    if scales.device != w.device:
        return format_problem(
            "scales.device", scales.device, f"w is on {w.device}", "Move the scales to the weight"
        )
    if scales.dim() != 2 or scales.shape[0] != w.shape[0] or not _divides(scales, w):
        return format_problem(
            "scales.shape",
            list(scales.shape),
            f"must be [{w.shape[0]}, G] with G a divisor of {w.shape[1]}, the inputs of w",
            "Pass one scale per group, e.g. expand a scale per row to [out, 1]",
        )
    return None


def _divides(scales: torch.Tensor, w: torch.Tensor) -> bool:
    num_groups, in_features = scales.shape[1], w.shape[1]
    return in_features == 0 if num_groups == 0 else in_features % num_groups == 0


def check_weight(w: torch.Tensor) -> None:
    """Raise BitcpmError unless w can be a latent weight: 2-D, float32/bfloat16/float16."""
    problem = find_weight_problem(w)
    if problem:
        raise BitcpmError(problem)


def check_weight_and_scales(w: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise BitcpmError unless w is a latent weight and scales_OG float32 fit it."""
    problem = find_weight_problem(w) or find_scales_problem(w, scales)
    if problem:
        raise BitcpmError(problem)


# ---- fakes: shapes and types without values, for meta tensors and torch.compile -----------------


def _assume_weight(w: torch.Tensor) -> None:
    _assume_none(find_weight_problem(w))


def _assume_scales(w: torch.Tensor, scales: torch.Tensor) -> None:
    _assume_none(find_weight_problem(w) or find_scales_problem(w, scales))


def _assume_none(problem: str | None) -> None:
    torch._check(problem is None, lambda: str(problem))  # type: ignore[no-untyped-call]


def _allocate_like(w: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def fake_quantize_fake(w: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """wq [O, I], contiguous, dtype of w."""
    _assume_weight(w)
    check_eps(eps)
    count_groups(w.shape[1], group_size)
    return _allocate_like(w)


def quantize_fake(
    w: torch.Tensor, group_size: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [O, I] and scales float32 [O, G]."""
    check_eps(eps)
    return w.new_empty(w.shape, dtype=torch.int8), abs_sums_fake(w, group_size)


def abs_sums_fake(w: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sums float32 [O, G]."""
    _assume_weight(w)
    return w.new_empty(w.shape[0], count_groups(w.shape[1], group_size), dtype=torch.float32)


def fake_quantize_with_scales_fake(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """wq [O, I], contiguous, dtype of w."""
    _assume_scales(w, scales)
    return _allocate_like(w)


def fake_quantize_inplace_fake(w: torch.Tensor, group_size: int, eps: float) -> None:
    """w is overwritten; no result."""
    fake_quantize_fake(w, group_size, eps)


def fake_quantize_with_scales_inplace_fake(w: torch.Tensor, scales: torch.Tensor) -> None:
    """w is overwritten; no result."""
    _assume_scales(w, scales)


FAKES: dict[str, Callable[..., Any]] = {
    "fake_quantize": fake_quantize_fake,
    "quantize": quantize_fake,
    "abs_sums": abs_sums_fake,
    "fake_quantize_with_scales": fake_quantize_with_scales_fake,
    "fake_quantize_": fake_quantize_inplace_fake,
    "fake_quantize_with_scales_": fake_quantize_with_scales_inplace_fake,
}

# ---- gradients ----------------------------------------------------------------------------------


def fake_quantize_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """Straight-through to w."""
    return grad, None, None


def fake_quantize_with_scales_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Straight-through to w, nothing to the scales."""
    return grad, None


def register() -> None:
    """Register fakes and gradients; called once, by `megatron_bitcpm.ops`."""
    for name in ("quantize", "abs_sums"):
        # Codes, scales and sums carry no gradient: autograd looks through these operators.
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    for name, fake in FAKES.items():
        torch.library.register_fake(f"bitcpm::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd("bitcpm::fake_quantize", fake_quantize_backward, lib=LIBRARY)
    torch.library.register_autograd(
        "bitcpm::fake_quantize_with_scales", fake_quantize_with_scales_backward, lib=LIBRARY
    )
