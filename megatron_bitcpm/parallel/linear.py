"""THE TERNARY LINEAR: Megatron's Column/RowParallelLinear over ternary weights.

    latent weight -> bitcpm::fake_quantize -> Megatron's own GEMM and collectives

The parameter stays Megatron's `weight` (name, tensor-parallel attributes, sharded state dict); only
the matrix that enters the GEMM changes. Gradients of the quantised weight go to the latent weight
unchanged (straight-through). Groups run along the input dimension, so column parallelism and fused
or permuted output rows never touch a scale.

Shape suffixes: O output features, I input features (both of the local shard), G groups per row.
Source: BitCPM-CANN technical report, sections 2 and 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_bitcpm import ops
from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.quant.groups import ShardedGroups

if TYPE_CHECKING:
    from megatron_bitcpm.config import QuantConfig
    from megatron_bitcpm.parallel.requantize import Requantizer


@dataclass(eq=False)
class TernarySite:
    """What a ternary linear knows beyond Megatron's module.

    Attributes:
        name: global name, for example ``decoder.layers.3.mlp.linear_fc2`` (layers count from 0
            over the whole model, whatever the pipeline stage).
        quant: the quantiser's configuration.
        tp_group, tp_size: the tensor-parallel group that shards this linear.
        row_parallel: whether the input dimension is sharded.
        requantizer: decides when the weight is quantised; shared by all sites of a model.
        fresh: the in-place weight (or the cached scales) belongs to the current latent weight.
        ran: a forward used the current weight.
        scales_OG: cached scales of full rows, float32 [O, 1], only where rows are sharded.
        groups: how the groups lie over the ranks.
    """

    name: str
    module: torch.nn.Module
    quant: QuantConfig
    tp_group: Any
    tp_size: int
    row_parallel: bool
    requantizer: Requantizer
    fresh: bool = False
    ran: bool = False
    scales_OG: torch.Tensor | None = None
    groups: ShardedGroups | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TernarySite:
        # A copy would share the optimizer and the process groups, and mark the original's weight.
        raise ModelError.of(
            "model", self.name, "a ternary linear cannot be copied",
            "Build the model again and load the state_dict taken within latents()",
        )  # fmt: skip

    @property
    def weight(self) -> torch.nn.Parameter:
        """The parameter, float [O, I]: latent, or quantised in place (see `Requantizer`)."""
        return self.module.weight

    @property
    def in_features_full(self) -> int:
        """Length of an unsharded row."""
        local = self.weight.shape[1]
        return local * self.tp_size if self.row_parallel else local

    @property
    def shares_scales(self) -> bool:
        """Whether a group spans several ranks, so that its scale needs their sums."""
        return self.groups is not None and self.groups.needs_sum_exchange

    def fake_quantize(self, w_OI: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the quantised weight, differentiable straight-through.

        Args:
            w_OI: latent weight, [O, I].
            rows: indices of the rows wanted, int64; None means all.
        """
        scales_OG = self.scales_OG
        if rows is not None:
            w_OI = w_OI[rows]
            scales_OG = None if scales_OG is None else scales_OG[rows]
        if self.shares_scales:
            assert scales_OG is not None
            return ops.fake_quantize_with_scales(w_OI, scales_OG)
        return ops.fake_quantize(w_OI, self.quant.group_size, self.quant.eps)

    def fake_quantize_(self) -> None:
        """Overwrite the parameter's storage with its quantised values; keep the latents first."""
        if self.shares_scales:
            assert self.scales_OG is not None
            ops.fake_quantize_with_scales_(self.weight.data, self.scales_OG)
        else:
            ops.fake_quantize_(self.weight.data, self.quant.group_size, self.quant.eps)


class TernaryLinear(torch.nn.Module):
    """Mixed in before a Megatron linear class; `ternary_class` builds the combination."""

    ternary: TernarySite

    @property
    def _forward_impl(self) -> Callable[..., torch.Tensor]:
        # A property serves both kinds of Megatron: up to core 0.13 forward assigns this name on the
        # instance, later it is a method that features such as MindSpeed's replace on the class.
        stock = self.__dict__.get("_stock_forward_impl")
        if stock is None:
            stock = super()._forward_impl
        return functools.partial(self._ternary_forward_impl, stock)

    @_forward_impl.setter
    def _forward_impl(self, stock: Callable[..., torch.Tensor]) -> None:
        self.__dict__["_stock_forward_impl"] = stock

    def _ternary_forward_impl(
        self, stock: Callable[..., torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        kwargs["weight"] = self.ternary.requantizer.weight_for_forward(
            self.ternary, kwargs["weight"]
        )
        return stock(**kwargs)

    def extra_repr(self) -> str:
        """Name the quantiser in the module's printed form."""
        quant = self.ternary.quant
        return f"{quant.grid}, group_size={quant.group_size}, {self.ternary.requantizer.mode}"


class TernaryColumnParallelLinear(TernaryLinear, ColumnParallelLinear):
    """Column-parallel ternary linear: shards the rows (outputs); scales need no communication."""


class TernaryRowParallelLinear(TernaryLinear, RowParallelLinear):
    """Row-parallel ternary linear: shards the inputs; whole-row scales span the ranks."""


_CLASSES: dict[type, type] = {
    ColumnParallelLinear: TernaryColumnParallelLinear,
    RowParallelLinear: TernaryRowParallelLinear,
}


def ternary_class(base: type) -> type:
    """Return the ternary subclass of whatever linear class a model was built with.

    Args:
        base: `ColumnParallelLinear`, `RowParallelLinear` or a subclass (for example MindSpeed's).
    """
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Ternary{base.__name__}", (TernaryLinear, base), {})
    return _CLASSES[base]
