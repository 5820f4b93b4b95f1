"""The quantiser of a model as one value: what it applies to, its codes and scales, its stamp.

Quantising works on full Hugging Face projections: groups run along the inputs, and Megatron's fused
weights only move rows, so the values are those of training bit for bit. Where a scale spans more
than a rank's shard, each slice of a row has a statistic, and those are put together in rank order:

    row statistic    the canonical sum of |w|, or for grids whose scale follows the largest |w| the
                     scale of the slice
    row              sums are added in rank order, of scales the largest counts
    projection       the canonical sum over the rows' sums, or the largest of their scales

Neither the division nor the bound of a scale changes an order, so the largest of several slices'
scales is that of the row, bit for bit, and NaN where one of them is. `parallel.scale_sync` calls
the same functions with the statistics that the ranks exchange.

Shape legend: O out, I in, G groups per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_bitcpm import ops
from megatron_bitcpm.arch.tensors import Dimensions, Place, Shape, TensorSpec, find_projection
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.errors import CheckpointError, one_line
from megatron_bitcpm.quant.fake_quant import codes_from_scales
from megatron_bitcpm.quant.grids import Grid, find_grid
from megatron_bitcpm.quant.groups import ShardedGroups, add_in_rank_order, resolve_sharded_groups
from megatron_bitcpm.quant.reciprocal import fake_quantize_reciprocal, quantize_reciprocal
from megatron_bitcpm.quant.settings import BF16_RECIPROCAL, FP32, NUMERICS, TENSOR, WHOLE_ROW
from megatron_bitcpm.version import __version__

_NOT_STAMPED = {"enabled", "backend", "requantize"}
"""Settings that do not change a value."""


@dataclass(frozen=True)
class Quantizer:
    """A quantiser.

    Attributes:
        config: grid, group size, smallest scale, filters.
        tp_size: tensor-parallel size of the training; decides the slices of row-parallel rows.
        numerics: one of `NUMERICS`.
    """

    config: QuantConfig
    tp_size: int = 1
    numerics: str = FP32

    @property
    def grid(self) -> Grid:
        """The levels and where their scale comes from."""
        return find_grid(self.config.grid)

    @property
    def per_projection(self) -> bool:
        """Whether a whole Hugging Face projection has one scale."""
        return self.config.group_size == TENSOR

    # -- what it applies to ------------------------------------------------------------------------

    def quantizes(self, place: Place, num_layers: int) -> bool:
        """Whether a projection is quantised, or stays in full precision."""
        assert place.layer is not None
        return not self.config.excludes(place.module, place.layer, num_layers)

    def groups_of(self, row_parallel: bool, in_features: int) -> ShardedGroups | None:
        """How the groups of a full weight lie over its ranks; None with one scale per projection.

        Of a `row_parallel` linear the ranks share rows, rather than hold some of them.

        Raises:
            BitcpmError: the groups do not fit.
        """
        size = self.config.group_size
        # A scale of a projection is made of whole rows, which must be cut evenly too.
        groups = resolve_sharded_groups(
            in_features,
            self.tp_size,
            size if isinstance(size, int) else WHOLE_ROW,
            "row" if row_parallel else "column",
            self.config.scale_sync,
        )
        return None if self.per_projection else groups

    def weights_per_scale(self, place: Place, shape: Shape) -> int:
        """Return how many consecutive weights share a scale: inputs of a row, or all of them."""
        groups = self.groups_of(place.spec.row_parallel, shape[1])
        return shape[0] * shape[1] if groups is None else groups.scale_len

    def tensors(self, shapes: Mapping[str, Shape], num_layers: int) -> dict[str, int]:
        """Return the quantised tensors of a model, name -> weights per scale, given all shapes.

        Raises:
            BitcpmError: the groups do not fit a shape.
        """
        places = {name: find_projection(name) for name in shapes}
        return {
            name: self.weights_per_scale(place, shapes[name])
            for name, place in places.items()
            if place is not None and self.quantizes(place, num_layers)
        }

    # -- statistics and scales ---------------------------------------------------------------------

    def row_statistics(self, w_OI: torch.Tensor) -> torch.Tensor:
        """Return the statistic of each row of a slice, float32 [O]."""
        if self.grid.statistic == "abs_sum":
            return ops.abs_sums(w_OI, -1).flatten()
        return ops.quantize(w_OI, -1, self.config.eps, self.grid.name)[1].flatten()

    def combine(self, slices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the statistics of whole rows, given those of their slices in rank order."""
        if self.grid.statistic == "abs_sum":
            return add_in_rank_order(slices)
        return torch.stack(list(slices)).amax(0)

    def reduce_rows(self, stats_O: torch.Tensor) -> torch.Tensor:
        """Return the statistic of a projection, float32 [1], given those of its rows."""
        if self.grid.statistic == "abs_sum":
            return ops.abs_sums(stats_O.unsqueeze(0), -1)[0]
        return stats_O.amax(0, keepdim=True)

    def scales_of(self, stats: torch.Tensor, num_weights: int) -> torch.Tensor:
        """Turn statistics into scales, float32 of the same shape; each is of `num_weights`."""
        if self.grid.statistic == "abs_sum":
            return ops.scales_from_sums(stats, num_weights, self.config.eps)
        return stats

    def projection_scales(
        self, stats_O: torch.Tensor, spec: TensorSpec, dims: Dimensions, in_features: int
    ) -> torch.Tensor:
        """Return the scale of each row of a fused weight, float32 [O, 1], one value per part.

        `stats_O` are of full rows; `spec` and `dims` say which row is of which part.
        """
        scales_O = torch.empty_like(stats_O)
        for rows in spec.split(torch.arange(len(stats_O), device=stats_O.device), dims):
            stat = self.reduce_rows(stats_O[rows])
            scales_O[rows] = self.scales_of(stat, len(rows) * in_features)
        return scales_O.unsqueeze(1)

    def fake_quantize(
        self, w_OI: torch.Tensor, group_size: int, scales_OG: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return wq of a weight or a shard; without given scales of its groups of `group_size`."""
        if scales_OG is not None:
            return ops.fake_quantize_with_scales(w_OI, scales_OG, self.grid.name)
        return ops.fake_quantize(w_OI, group_size, self.config.eps, self.grid.name)

    # -- full projections --------------------------------------------------------------------------

    def values(self, w_OI: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """Return what the training forward multiplies with: wq [O, I], a new tensor of w's dtype.

        `w_OI` is a full latent projection in the dtype of the training, `spec` the linear it is of.
        Groups with a latent that is not finite become NaN.

        Raises:
            BitcpmError: the numerics do not exist for the dtype of w.
        """
        if self._is_reciprocal:
            return fake_quantize_reciprocal(w_OI, *self._sums(w_OI, spec), self.config.eps)
        return self.fake_quantize(w_OI, *self._groups_or_scales(w_OI, spec))

    def codes_scales(
        self, w_OI: torch.Tensor, spec: TensorSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `values` are made of: stored codes, int8 [O, I], and scales, float32 [O, G].

        Scales have the units of w; G is 1 with one scale per projection.
        """
        if self._is_reciprocal:
            return quantize_reciprocal(w_OI, *self._sums(w_OI, spec), self.config.eps)
        group_size, scales_OG = self._groups_or_scales(w_OI, spec)
        if scales_OG is None:
            return ops.quantize(w_OI, group_size, self.config.eps, self.grid.name)
        return codes_from_scales(w_OI, scales_OG, self.grid.name), scales_OG

    @property
    def _is_reciprocal(self) -> bool:
        assert self.has_numerics(self.numerics), "see `check_numerics`"
        return self.numerics == BF16_RECIPROCAL

    def _groups_or_scales(
        self, w_OI: torch.Tensor, spec: TensorSpec
    ) -> tuple[int, torch.Tensor | None]:
        """Return the inputs per scale, and the scales where operators cannot find them alone."""
        groups = self.groups_of(spec.row_parallel, w_OI.shape[1])
        # The largest |w| of a row is that of its slices.
        alone = groups is not None and self.grid.statistic == "abs_max"
        if groups is not None and (alone or not groups.needs_sum_exchange):
            return groups.scale_len, None
        stats_O1, num_weights = self._sums(w_OI, spec)
        return -1, self.scales_of(stats_O1, num_weights)

    def _sums(self, w_OI: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor, int]:
        """Return the statistics of the groups, float32 [O, G], and the weights behind each."""
        out_features, in_features = w_OI.shape
        groups = self.groups_of(spec.row_parallel, in_features)
        if groups is not None and not groups.needs_sum_exchange:
            return ops.abs_sums(w_OI, groups.scale_len), groups.scale_len
        slices = self.tp_size if spec.row_parallel else 1
        stats_O = self.combine([self.row_statistics(part) for part in w_OI.chunk(slices, 1)])
        if groups is not None:
            return stats_O.unsqueeze(1), in_features
        stat_11 = self.reduce_rows(stats_O).unsqueeze(1)
        return stat_11.expand(out_features, 1).contiguous(), w_OI.numel()

    # -- the stamp ---------------------------------------------------------------------------------

    def stamp(self) -> dict[str, Any]:
        """Return what a model must record to reproduce its values, as JSON."""
        return {
            **self.config.model_dump(mode="json", exclude=_NOT_STAMPED),
            "numerics": self.numerics,
            "tensor_model_parallel_size": self.tp_size,
            "megatron_bitcpm": __version__,
        }

    @staticmethod
    def from_stamp(stamp: Any, source: Path) -> Quantizer:
        """Return the quantiser of a stamp, ``quantizer`` in a JSON file; `source` is for messages.

        Raises:
            CheckpointError: the stamp is damaged, or of a quantiser unknown here.
        """
        fix = "Use the package version that wrote the model"
        try:
            fields = {key: stamp[key] for key in QuantConfig.model_fields if key in stamp}
            tp_size, numerics = stamp["tensor_model_parallel_size"], stamp["numerics"]
            if type(tp_size) is not int or tp_size < 1:
                raise ValueError(f"tensor_model_parallel_size {tp_size}")
            quantizer = Quantizer(QuantConfig(**fields), tp_size, numerics)
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"quantizer={source}: unreadable stamp: {one_line(error)}. {fix}."
            ) from error
        if numerics not in NUMERICS:
            raise CheckpointError(
                f"numerics={numerics}: the model's codes need {' or '.join(NUMERICS)}. {fix}."
            )
        quantizer.check_numerics()
        return quantizer

    def has_numerics(self, numerics: str) -> bool:
        """Whether an arithmetic exists for the grid."""
        return numerics == FP32 or self.grid.is_ternary

    def check_numerics(self) -> None:
        """Refuse an arithmetic that the grid lacks: bf16_reciprocal is for the ternary grid."""
        if not self.has_numerics(self.numerics):
            raise CheckpointError(
                f"numerics={self.numerics}: exists for the ternary grid, not for "
                f"{self.grid.name}. Use numerics {FP32}."
            )
