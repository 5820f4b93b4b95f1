"""The operators' contract: names and types, their fakes and their gradients.

Backends (`_reference`, `_cpu`) only fill these definitions in. What the operators compute is in
`megatron_bitcpm.quant` and docs/quantizer.md, what they refuse in `_checks`.

Gradient: straight-through, d loss / d input = d loss / d output, registered as a formula of the
operator. The forward value is exactly on the grid; ``w + (wq - w).detach()`` would leave it in 1 to
4 % of the entries, because that sum rounds.

Shape legend: O out, I in, G groups per row, P packed bytes per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_bitcpm.ops import _checks
from megatron_bitcpm.quant.grids import find_grid
from megatron_bitcpm.quant.groups import count_groups
from megatron_bitcpm.quant.packing import count_packed_bytes
from megatron_bitcpm.quant.scales import check_eps

LIBRARY: Any = torch.library.Library("bitcpm", "DEF")  # type: ignore[no-untyped-call]

_GROUPS = 'int group_size=-1, float eps=1e-5, str grid="ternary"'
_GRID = 'str grid="ternary"'
SCHEMAS = {
    "fake_quantize": f"(Tensor w, {_GROUPS}) -> Tensor",
    "quantize": f"(Tensor w, {_GROUPS}) -> (Tensor codes, Tensor scales)",
    "abs_sums": "(Tensor w, int group_size=-1) -> Tensor",
    "fake_quantize_with_scales": f"(Tensor w, Tensor scales, {_GRID}) -> Tensor",
    "fake_quantize_": f"(Tensor(a!) w, {_GROUPS}) -> ()",
    "fake_quantize_with_scales_": f"(Tensor(a!) w, Tensor scales, {_GRID}) -> ()",
    "foreach_fake_quantize_": f"(Tensor(a!)[] ws, {_GROUPS}) -> ()",
    "foreach_fake_quantize_with_scales_": (f"(Tensor(a!)[] ws, Tensor[] scales, {_GRID}) -> ()"),
    "pack2": "(Tensor codes) -> Tensor",
    "unpack2": "(Tensor packed, int in_features) -> Tensor",
    "int8_per_token": "(Tensor x) -> Tensor",
}

for _name, _signature in SCHEMAS.items():
    LIBRARY.define(_name + _signature)

# ---- fakes: shapes and types without values, for meta tensors and torch.compile -----------------


def _assume_none(problem: str | None) -> None:
    torch._check(problem is None, lambda: str(problem))  # type: ignore[no-untyped-call]


def _assume_groups(w: torch.Tensor, group_size: int, eps: float, grid: str) -> None:
    check_eps(eps)
    find_grid(grid)
    count_groups(w.shape[1], group_size)


def _allocate_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fake_quantize_fake(
    w: torch.Tensor, group_size: int = -1, eps: float = 1e-5, grid: str = "ternary"
) -> torch.Tensor:
    """wq [O, I], contiguous, dtype of w."""
    _assume_none(_checks.find_weight_problem(w))
    _assume_groups(w, group_size, eps, grid)
    return _allocate_like(w)


def quantize_fake(
    w: torch.Tensor, group_size: int = -1, eps: float = 1e-5, grid: str = "ternary"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [O, I] and scales float32 [O, G]."""
    scales = abs_sums_fake(w, group_size)
    _assume_groups(w, group_size, eps, grid)
    return w.new_empty(w.shape, dtype=torch.int8), scales


def abs_sums_fake(w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """Sums float32 [O, G]."""
    _assume_none(_checks.find_weight_problem(w))
    return w.new_empty(w.shape[0], count_groups(w.shape[1], group_size), dtype=torch.float32)


def fake_quantize_with_scales_fake(
    w: torch.Tensor, scales: torch.Tensor, grid: str = "ternary"
) -> torch.Tensor:
    """wq [O, I], contiguous, dtype of w."""
    _assume_none(_checks.find_weight_problem(w) or _checks.find_scales_problem(w, scales))
    find_grid(grid)
    return _allocate_like(w)


def fake_quantize_inplace_fake(
    w: torch.Tensor, group_size: int = -1, eps: float = 1e-5, grid: str = "ternary"
) -> None:
    """w is overwritten; no result."""
    fake_quantize_fake(w, group_size, eps, grid)


def fake_quantize_with_scales_inplace_fake(
    w: torch.Tensor, scales: torch.Tensor, grid: str = "ternary"
) -> None:
    """w is overwritten; no result."""
    fake_quantize_with_scales_fake(w, scales, grid)


def foreach_fake_quantize_fake(
    ws: Sequence[torch.Tensor], group_size: int = -1, eps: float = 1e-5, grid: str = "ternary"
) -> None:
    """Each of ws is overwritten; no result."""
    _assume_none(_checks.find_list_problem(ws))
    for w in ws:
        _assume_groups(w, group_size, eps, grid)


def foreach_fake_quantize_with_scales_fake(
    ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], grid: str = "ternary"
) -> None:
    """Each of ws is overwritten; no result."""
    _assume_none(_checks.find_list_problem(ws, scales))
    find_grid(grid)


def pack2_fake(codes: torch.Tensor) -> torch.Tensor:
    """Packed uint8 [O, P]."""
    _assume_none(_checks.find_codes_problem(codes))
    packed_len = count_packed_bytes(codes.shape[1])
    return codes.new_empty(codes.shape[0], packed_len, dtype=torch.uint8)


def unpack2_fake(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Codes int8 [O, I]."""
    _assume_none(_checks.find_packed_problem(packed, in_features))
    return packed.new_empty(packed.shape[0], in_features, dtype=torch.int8)


def int8_per_token_fake(x: torch.Tensor) -> torch.Tensor:
    """x_q, contiguous, shape and dtype of x."""
    _assume_none(_checks.find_activation_problem(x))
    return _allocate_like(x)


FAKES: dict[str, Callable[..., Any]] = {
    "fake_quantize": fake_quantize_fake,
    "quantize": quantize_fake,
    "abs_sums": abs_sums_fake,
    "fake_quantize_with_scales": fake_quantize_with_scales_fake,
    "fake_quantize_": fake_quantize_inplace_fake,
    "fake_quantize_with_scales_": fake_quantize_with_scales_inplace_fake,
    "foreach_fake_quantize_": foreach_fake_quantize_fake,
    "foreach_fake_quantize_with_scales_": foreach_fake_quantize_with_scales_fake,
    "pack2": pack2_fake,
    "unpack2": unpack2_fake,
    "int8_per_token": int8_per_token_fake,
}

# ---- gradients ----------------------------------------------------------------------------------


def fake_quantize_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    """Straight-through to w."""
    return grad, None, None, None


def fake_quantize_with_scales_backward(
    ctx: Any, grad: torch.Tensor
) -> tuple[torch.Tensor, None, None]:
    """Straight-through to w, nothing to the scales."""
    return grad, None, None


def int8_per_token_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    """Straight-through to x."""
    return grad


BACKWARDS: dict[str, Callable[..., Any]] = {
    "fake_quantize": fake_quantize_backward,
    "fake_quantize_with_scales": fake_quantize_with_scales_backward,
    "int8_per_token": int8_per_token_backward,
}


def register() -> None:
    """Register fakes and gradients; called once, by `megatron_bitcpm.ops`."""
    for name in ("quantize", "abs_sums"):
        # Codes, scales and sums carry no gradient: autograd looks through these operators.
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    for name, fake in FAKES.items():
        torch.library.register_fake(f"bitcpm::{name}", fake, lib=LIBRARY)
    for name, backward in BACKWARDS.items():
        torch.library.register_autograd(f"bitcpm::{name}", backward, lib=LIBRARY)
