"""The operators' contract: names and types, fakes, gradients, and the reference for every device.

What the operators compute is in `megatron_bitcpm.quant` and docs/quantizer.md.

Gradient: straight-through, d loss / d input = d loss / d output, registered as a formula of the
operator. The forward value is exactly on the grid; ``w + (wq - w).detach()`` would leave it in 1 to
4 % of the entries, because that sum rounds.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_bitcpm.ops._operators import Operators
from megatron_bitcpm.ops._reference import EMPTY, REFERENCE
from megatron_bitcpm.quant.grids import TERNARY
from megatron_bitcpm.quant.settings import DEFAULT_EPS

LIBRARY: Any = torch.library.Library("bitcpm", "DEF")  # type: ignore[no-untyped-call]

_GRID = f'str grid="{TERNARY}"'
_GROUPS = f"int group_size=-1, float eps={DEFAULT_EPS}, {_GRID}"
SCHEMAS = {
    "fake_quantize": f"(Tensor w, {_GROUPS}) -> Tensor",
    "quantize": f"(Tensor w, {_GROUPS}) -> (Tensor codes, Tensor scales)",
    "abs_sums": "(Tensor w, int group_size=-1) -> Tensor",
    "fake_quantize_with_scales": f"(Tensor w, Tensor scales, {_GRID}) -> Tensor",
    "fake_quantize_": f"(Tensor(a!) w, {_GROUPS}) -> ()",
    "fake_quantize_with_scales_": f"(Tensor(a!) w, Tensor scales, {_GRID}) -> ()",
    "foreach_fake_quantize_": f"(Tensor(a!)[] ws, {_GROUPS}) -> ()",
    "foreach_fake_quantize_with_scales_": f"(Tensor(a!)[] ws, Tensor[] scales, {_GRID}) -> ()",
    "pack2": "(Tensor codes) -> Tensor",
    "unpack2": "(Tensor packed, int in_features) -> Tensor",
    "int8_per_token": "(Tensor x) -> Tensor",
}

# Arguments of the operators that pass the gradient straight through, all of it to the first.
NUM_ARGUMENTS = {"fake_quantize": 4, "fake_quantize_with_scales": 3, "int8_per_token": 1}

for _name, _signature in SCHEMAS.items():
    LIBRARY.define(_name + _signature)


def _make_backward(num_arguments: int) -> Any:
    return lambda ctx, grad: (grad, *[None] * (num_arguments - 1))


def register() -> None:
    """Register fakes, gradients, and the reference, which yields to kernels of a device."""
    reference = Operators(lambda tensors, grid: REFERENCE)
    fakes = Operators(lambda tensors, grid: EMPTY, has_memory=False)
    for name in SCHEMAS:
        LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"bitcpm::{name}", getattr(fakes, name), lib=LIBRARY)
    for name in ("quantize", "abs_sums"):
        # Codes, scales and sums carry no gradient: autograd looks through these operators.
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    for name, num_arguments in NUM_ARGUMENTS.items():
        backward = _make_backward(num_arguments)
        torch.library.register_autograd(f"bitcpm::{name}", backward, lib=LIBRARY)
