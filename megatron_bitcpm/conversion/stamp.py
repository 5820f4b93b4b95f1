"""The quantiser of a model, and the values that its training forward multiplied with.

Quantising works on Hugging Face's projections: groups run along the inputs, and Megatron's fused
weights only interleave their rows, so the values are those of training bit for bit. What tensor
parallelism did cut, the rows of `o_proj` and `down_proj`, is summed in the slices of the training,
in rank order; the stamp records how many there were.

Shape legend: O out, I in, G groups per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_bitcpm import ops
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.names import FusedLinear, Projection, find_projection
from megatron_bitcpm.errors import CheckpointError, one_line
from megatron_bitcpm.quant.groups import ShardedGroups, abs_sums_sliced, resolve_sharded_groups
from megatron_bitcpm.quant.reciprocal import fake_quantize_reciprocal
from megatron_bitcpm.quant.selection import is_excluded
from megatron_bitcpm.version import __version__

FP32 = "fp32"
BF16_RECIPROCAL = "bf16_reciprocal"
NUMERICS = (FP32, BF16_RECIPROCAL)
"""Arithmetics of a quantiser: this package's, and the one inferred for the released latents."""


@dataclass(frozen=True)
class QuantizerStamp:
    """The quantiser that a model was trained with.

    Attributes:
        quant: its configuration.
        tp_size: tensor-parallel size of the training; decides the slices of sharded rows.
        numerics: one of `NUMERICS`.
    """

    quant: QuantConfig
    tp_size: int = 1
    numerics: str = FP32

    def content(self) -> dict[str, Any]:
        """Return the stamp as JSON; `parse_stamp` reads it."""
        return {
            **self.quant.model_dump(mode="json", exclude={"enabled", "backend", "requantize"}),
            "numerics": self.numerics,
            "tensor_model_parallel_size": self.tp_size,
            "megatron_bitcpm": __version__,
        }

    def quantizes(self, projection: Projection, num_layers: int) -> bool:
        """Whether a projection was trained quantised, or stayed in full precision."""
        return not is_excluded(projection.megatron_name, projection.layer, num_layers, self.quant)

    def groups_of(self, linear: FusedLinear, in_features: int) -> ShardedGroups | None:
        """How the groups of a quantised linear lie; None with one scale per projection."""
        if self.quant.group_size == "tensor":
            return None
        return resolve_sharded_groups(
            in_features,
            self.tp_size,
            self.quant.group_size,
            "row" if linear.row_parallel else "column",
            self.quant.scale_sync,
        )

    def weights_per_scale(self, projection: Projection, shape: tuple[int, ...]) -> int:
        """Return how many consecutive weights share a scale: inputs of a row, or all of them."""
        groups = self.groups_of(projection.linear, shape[1])
        return shape[0] * shape[1] if groups is None else groups.scale_len


def parse_stamp(stamp: Any, source: Path) -> QuantizerStamp:
    """Check a quantiser stamp and return what it says.

    Args:
        stamp: content of ``quantizer`` in a JSON file.
        source: the file or its folder, for messages.

    Raises:
        CheckpointError: the stamp is damaged, or of a quantiser unknown here.
    """
    try:
        fields = {key: stamp[key] for key in QuantConfig.model_fields if key in stamp}
        quant = QuantConfig(**fields)
        tp_size, numerics = int(stamp["tensor_model_parallel_size"]), stamp["numerics"]
        if tp_size < 1:
            raise ValueError(f"tensor_model_parallel_size {tp_size}")
    # Infinity is a number to JSON: OverflowError.
    except (ValidationError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"quantizer={source}: unreadable stamp: {one_line(error)}. Use the package "
            "version that wrote the model."
        ) from error
    if numerics not in NUMERICS:
        raise CheckpointError(
            f"numerics={numerics}: the model's codes need {' or '.join(NUMERICS)}. Use the package "
            "version that wrote the model."
        )
    return QuantizerStamp(quant, tp_size, numerics)


def list_quantized_tensors(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, stamp: QuantizerStamp | None
) -> dict[str, int]:
    """Return the quantised Hugging Face tensors: name -> weights per scale.

    Args:
        shapes: name -> shape of all tensors of the model.
        num_layers: layers of the whole model.
        stamp: the quantiser, None for a full-precision model.

    Raises:
        BitcpmError: the groups of the stamp do not fit a shape.
    """
    if stamp is None:
        return {}
    tensors = {}
    for name, shape in shapes.items():
        projection = find_projection(name)
        if projection is not None and stamp.quantizes(projection, num_layers):
            tensors[name] = stamp.weights_per_scale(projection, shape)
    return tensors


def fake_quantize_projection(
    w_OI: torch.Tensor, projection: Projection, stamp: QuantizerStamp
) -> torch.Tensor:
    """Return the values of the training forward of one quantised projection.

    Args:
        w_OI: full latent weight, [O, I], in the dtype of the training.
        projection: which it is.
        stamp: the quantiser.
    Returns:
        wq_OI, a new tensor, dtype of w; NaN in groups with a non-finite latent.

    Raises:
        BitcpmError: the stamp's numerics do not exist for its grid or for the dtype of w.
    """
    quant, linear = stamp.quant, projection.linear
    if stamp.numerics == BF16_RECIPROCAL:
        return _fake_quantize_reciprocal(w_OI, projection, stamp)
    groups = stamp.groups_of(linear, w_OI.shape[1])
    if groups is None:
        return _fake_quantize_tensor(w_OI, stamp, linear.row_parallel)
    if groups.needs_sum_exchange and quant.grid == "ternary":
        sums_O1 = abs_sums_sliced(w_OI, stamp.tp_size)
        scales_O1 = ops.scales_from_sums(sums_O1, groups.scale_len, quant.eps)
        return ops.fake_quantize_with_scales(w_OI, scales_O1, quant.grid)
    # The other grids follow the largest |w|, which slices do not change.
    return ops.fake_quantize(w_OI, groups.scale_len, quant.eps, quant.grid)


def _fake_quantize_reciprocal(
    w_OI: torch.Tensor, projection: Projection, stamp: QuantizerStamp
) -> torch.Tensor:
    """The same sums as in the other numerics, see `quant.reciprocal` for the rest."""
    quant, linear = stamp.quant, projection.linear
    if quant.grid != "ternary":
        raise CheckpointError(
            f"numerics={stamp.numerics}: exists for the ternary grid, not for {quant.grid}. Use "
            f"numerics {FP32}."
        )
    groups = stamp.groups_of(linear, w_OI.shape[1])
    if groups is None:
        sum_11 = _sum_tensor(w_OI, stamp.tp_size if linear.row_parallel else 1)
        sums_O1 = sum_11.expand(w_OI.shape[0], 1)
        return fake_quantize_reciprocal(w_OI, sums_O1, w_OI.numel(), quant.eps)
    if groups.needs_sum_exchange:
        sums_OG = abs_sums_sliced(w_OI, stamp.tp_size)
    else:
        sums_OG = ops.abs_sums(w_OI, groups.scale_len)
    return fake_quantize_reciprocal(w_OI, sums_OG, groups.scale_len, quant.eps)


def _sum_tensor(w_OI: torch.Tensor, slices: int) -> torch.Tensor:
    """Sum |w| of a whole projection: over its rows' sums in the canonical order; [1, 1]."""
    sums_O1 = abs_sums_sliced(w_OI, slices)
    return ops.abs_sums(sums_O1.view(1, -1), -1)


def _fake_quantize_tensor(
    w_OI: torch.Tensor, stamp: QuantizerStamp, row_parallel: bool
) -> torch.Tensor:
    """One scale for all of a projection: of its rows' statistics, see `parallel.projections`."""
    quant = stamp.quant
    if quant.grid == "ternary":
        sum_11 = _sum_tensor(w_OI, stamp.tp_size if row_parallel else 1)
        scale_11 = ops.scales_from_sums(sum_11, w_OI.numel(), quant.eps)
    else:
        _, scales_O1 = ops.quantize(w_OI, -1, quant.eps, quant.grid)
        scale_11 = scales_O1.amax(0, keepdim=True)
    scales_O1 = scale_11.expand(w_OI.shape[0], 1).contiguous()
    return ops.fake_quantize_with_scales(w_OI, scales_O1, quant.grid)
