"""What a ternary linear knows beyond Megatron's module, and how its weight is quantised.

Shape suffixes: O output features, I input features (both of the local shard), G groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.arch.tensors import Dimensions, TensorSpec
from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.quant.groups import ShardedGroups
from megatron_bitcpm.quantizer import Quantizer


class SuppliesWeight(Protocol):
    """What a linear needs of the object that decides when weights are quantised."""

    mode: str

    def weight_for_forward(self, site: TernarySite, weight: torch.Tensor) -> torch.Tensor:
        """Return the matrix for the GEMM, [O, I]; `weight` is the module's parameter."""


@dataclass(eq=False)
class TernarySite:
    """One ternary linear on this rank.

    Attributes:
        name: global: layers count from 0 over all stages (``decoder.layers.3.mlp.linear_fc2``).
        groups: how the groups lie over the ranks; None with one scale per projection.
        fused: which row belongs to which projection; None where scales do not depend on that.
        fresh: the in-place weight (or the cached scales) belongs to the current latent weight.
        ran: a forward used the current weight.
        scales_OG: cached scales of the local rows, float32 [O, 1], only where `takes_scales`.
    """

    name: str
    module: Any
    quantizer: Quantizer
    tp_group: Any
    row_parallel: bool
    groups: ShardedGroups | None = None
    fused: tuple[TensorSpec, Dimensions] | None = None
    fresh: bool = False
    ran: bool = False
    scales_OG: torch.Tensor | None = None
    requantizer: SuppliesWeight = field(init=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> TernarySite:
        # A copy would share the optimizer and the process groups, and mark the original's weight.
        raise ModelError(
            f"model={self.name}: a ternary linear cannot be copied. Build the model again and load "
            "the state_dict taken within latents()."
        )

    @property
    def weight(self) -> torch.nn.Parameter:
        """The parameter, float [O, I]: latent, or quantised in place (see `requantize`)."""
        weight: torch.nn.Parameter = self.module.weight
        return weight

    @property
    def in_features_full(self) -> int:
        """Length of an unsharded row."""
        local = self.weight.shape[1]
        return local * self.quantizer.tp_size if self.row_parallel else local

    @property
    def takes_scales(self) -> bool:
        """Whether the scales come from `scale_sync`, being of more than this shard of a row."""
        return self.groups is None or self.groups.needs_sum_exchange

    @property
    def local_group_size(self) -> int:
        """What the operators are told where they find the scales themselves."""
        assert self.groups is not None, "scales are given"
        return self.groups.local_group_size

    def fake_quantize(self, w_OI: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the quantised weight of a latent one, straight-through; of all or some rows."""
        if rows is not None:
            w_OI = w_OI[rows]
        if not self.takes_scales:
            return self.quantizer.fake_quantize(w_OI, self.local_group_size)
        assert self.scales_OG is not None
        scales_OG = self.scales_OG if rows is None else self.scales_OG[rows]
        return self.quantizer.fake_quantize(w_OI, -1, scales_OG)


def fake_quantize_sites_(sites: list[TernarySite]) -> None:
    """Overwrite the parameters with their quantised values, few operators for all of them."""
    if not sites:
        return
    quant = sites[0].quantizer.config
    given: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    by_group_size: dict[int, list[torch.Tensor]] = {}
    for site in sites:
        if site.takes_scales:
            assert site.scales_OG is not None
            given.append(site.weight.data)
            scales.append(site.scales_OG)
        else:
            by_group_size.setdefault(site.local_group_size, []).append(site.weight.data)
    if given:
        ops.foreach_fake_quantize_with_scales_(given, scales, quant.grid)
    for group_size, weights in by_group_size.items():
        ops.foreach_fake_quantize_(weights, group_size, quant.eps, quant.grid)
