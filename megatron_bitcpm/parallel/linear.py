"""THE TERNARY LINEAR: Megatron's Column/RowParallelLinear over ternary weights.

    latent weight -> bitcpm::fake_quantize -> Megatron's own GEMM and collectives
    (input -> bitcpm::int8_per_token, with quant.activation) -^

The parameter stays Megatron's `weight` (name, tensor-parallel attributes, sharded state dict); only
what enters the GEMM changes. Gradients of the quantised weight go to the latent weight unchanged
(straight-through), and so do those of the quantised input. Groups run along the input dimension, so
column parallelism and fused or permuted output rows never touch a scale; `group_size: tensor` alone
looks at the rows, see `projections`.

The input is quantised as this rank holds it. Before the gather of sequence parallelism that is the
same as after it, since a token is never cut; row parallelism does cut tokens, and each slice has
its own scale, as in the report.

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
from megatron_bitcpm.parallel.projections import ProjectionRows
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
        scales_OG: cached scales of the local rows, float32 [O, 1], only where `takes_scales`.
        groups: how the groups lie over the ranks; None with one scale per projection.
        projection_rows: which row belongs to which projection, only with ``group_size: tensor``.
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
    projection_rows: ProjectionRows | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TernarySite:
        # A copy would share the optimizer and the process groups, and mark the original's weight.
        raise ModelError(
            f"model={self.name}: a ternary linear cannot be copied. Build the model again and load "
            "the state_dict taken within latents()."
        )

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
    def takes_scales(self) -> bool:
        """Whether the scales come from `scale_sync`, being of more than this shard of a row."""
        if self.groups is None:
            return True
        return self.groups.needs_sum_exchange

    @property
    def local_group_size(self) -> int:
        """What the operators are told where they find the scales themselves."""
        assert self.groups is not None, "scales are given"
        return self.groups.local_group_size

    def fake_quantize(self, w_OI: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the quantised weight, differentiable straight-through.

        Args:
            w_OI: latent weight, [O, I].
            rows: indices of the rows wanted, int64; None means all.
        """
        quant, scales_OG = self.quant, self.scales_OG
        if rows is not None:
            w_OI = w_OI[rows]
            scales_OG = None if scales_OG is None else scales_OG[rows]
        if self.takes_scales:
            assert scales_OG is not None
            return ops.fake_quantize_with_scales(w_OI, scales_OG, quant.grid)
        return ops.fake_quantize(w_OI, self.local_group_size, quant.eps, quant.grid)


def fake_quantize_sites_(sites: list[TernarySite]) -> None:
    """Overwrite the parameters with their quantised values; keep the latents first.

    One operator for all weights whose scales are given, one for all others, so that threads are
    shared out over the whole model.
    """
    if not sites:
        return
    quant = sites[0].quant
    given = [site for site in sites if site.takes_scales]
    if given:
        scales = [site.scales_OG for site in given if site.scales_OG is not None]
        assert len(scales) == len(given)
        ops.foreach_fake_quantize_with_scales_(
            [site.weight.data for site in given], scales, quant.grid
        )
    by_group_size: dict[int, list[torch.Tensor]] = {}
    for site in sites:
        if not site.takes_scales:
            by_group_size.setdefault(site.local_group_size, []).append(site.weight.data)
    for group_size, weights in by_group_size.items():
        ops.foreach_fake_quantize_(weights, group_size, quant.eps, quant.grid)


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
        site = self.ternary
        kwargs["weight"] = site.requantizer.weight_for_forward(site, kwargs["weight"])
        if site.quant.activation == "int8_per_token":
            if "input" not in kwargs:
                raise ModelError(
                    f"quant.activation=int8_per_token: {type(self).__name__} ({site.name}) names "
                    "the input of its matrix multiplication otherwise: "
                    f"{', '.join(sorted(kwargs))}. Use none."
                )
            kwargs["input"] = ops.int8_per_token(kwargs["input"])
        return stock(**kwargs)

    def extra_repr(self) -> str:
        """Name the quantiser in the module's printed form."""
        quant = self.ternary.quant
        text = f"{quant.grid}, group_size={quant.group_size}, {self.ternary.requantizer.mode}"
        return text if quant.activation == "none" else f"{text}, {quant.activation}"


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
