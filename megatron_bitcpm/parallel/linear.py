"""THE TERNARY LINEAR: Megatron's Column/RowParallelLinear over ternary weights.

    latent weight -> bitcpm::fake_quantize -> Megatron's own GEMM and collectives
    (input -> bitcpm::int8_per_token, with quant.activation) -^

The parameter stays Megatron's `weight`; gradients of the quantised weight and input pass unchanged
(straight-through). Groups run along the input dimension, so that output rows may be sharded, fused
or permuted; `group_size: tensor` alone looks at the rows.

The input is quantised as this rank holds it. Sequence parallelism never cuts a token; row
parallelism does, and each slice has its own scale, as in the report.

Source: BitCPM-CANN technical report, sections 2 and 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel.site import TernarySite


class TernaryLinear(torch.nn.Module):
    """Mixed in before a Megatron linear class; `ternary_class` builds the combination."""

    ternary: TernarySite

    @property
    def _forward_impl(self) -> Callable[..., torch.Tensor]:
        # A property serves both kinds of Megatron: up to core 0.13 forward assigns this name on the
        # instance, later it is a method that features such as MindSpeed's replace on the class.
        stock = self.__dict__.get("_stock_forward_impl")
        if stock is None:
            linear: Any = super()
            stock = linear._forward_impl
        return functools.partial(self._ternary_forward_impl, stock)

    @_forward_impl.setter
    def _forward_impl(self, stock: Callable[..., torch.Tensor]) -> None:
        self.__dict__["_stock_forward_impl"] = stock

    def _ternary_forward_impl(
        self, stock: Callable[..., torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        site = self.ternary
        kwargs["weight"] = site.requantizer.weight_for_forward(site, kwargs["weight"])
        if site.quantizer.config.activation == "int8_per_token":
            if "input" not in kwargs:
                raise ModelError(
                    f"quant.activation=int8_per_token: {type(self).__name__} ({site.name}) calls "
                    f"its matrix multiplication with {', '.join(sorted(kwargs))}, without `input`. "
                    "Use none."
                )
            kwargs["input"] = ops.int8_per_token(kwargs["input"])
        return stock(**kwargs)

    def extra_repr(self) -> str:
        """Name the quantiser in the module's printed form."""
        quant = self.ternary.quantizer.config
        text = f"{quant.grid}, group_size={quant.group_size}, {self.ternary.requantizer.mode}"
        return text if quant.activation == "none" else f"{text}, {quant.activation}"


@functools.cache
def ternary_class(base: type) -> type:
    """Return the ternary subclass of a Column- or RowParallelLinear, or of their subclass."""
    return type(f"Ternary{base.__name__}", (TernaryLinear, base), {})
