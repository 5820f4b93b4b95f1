"""What the projections of a model are on, tensor by tensor: the quantiser's part of `inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.grid_reading import CodeCount
from megatron_bitcpm.conversion.infer_grid import FoundGrid, infer_grid
from megatron_bitcpm.conversion.names import Projection
from megatron_bitcpm.conversion.quantization_error import LatentFigures
from megatron_bitcpm.conversion.stamp import QuantizerStamp, fake_quantize_projection
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.grids import find_grid

SCALE_BITS = 32
"""Bits of a packed scale (float32)."""


@dataclass
class ProjectionTotals:
    """Totals over the projections that `add` was given.

    Attributes:
        stamp, form: of the model, see `ModelSource`.
        folded: whether constants were multiplied into the values.
        groups: name of a projection -> group size as configured -> tensors.
        codes: grid -> totals of the tensors on it.
        off_grid: tensors on no grid.
        figures: quantisation error of those.
        disagree: tensors whose values are not on the stamp's grid.
        quantized_already: tensors of latents that are on a grid.
        misfits: what of the stamp does not fit the shapes, by tensor.
        packed_bytes: tensor -> its bytes with packed codes and float32 scales.
    """

    stamp: QuantizerStamp | None
    form: str
    folded: bool
    groups: dict[str, Counter[int | str]] = field(default_factory=dict)
    codes: dict[str, CodeCount] = field(default_factory=dict)
    off_grid: list[str] = field(default_factory=list)
    figures: LatentFigures = field(default_factory=LatentFigures)
    disagree: list[str] = field(default_factory=list)
    quantized_already: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    packed_bytes: dict[str, float] = field(default_factory=dict)
    _hints: dict[str, FoundGrid | None] = field(default_factory=dict)

    @property
    def used(self) -> QuantizerStamp:
        """The model's quantiser; without a stamp the default one, to measure latents with."""
        return self.stamp or QuantizerStamp(QuantConfig())

    def add(self, name: str, projection: Projection, w_OI: torch.Tensor, num_layers: int) -> None:
        """Add a projection.

        Args:
            name: of the tensor.
            projection: which it is.
            w_OI: stored values, [O, I], finite and not all 0.
            num_layers: layers of the model.
        """
        expected = self._expected_group(name, projection, w_OI, num_layers)
        grid = self._infer(name, projection, w_OI, expected)
        if grid is not None:
            if self.form == "latent" and expected is not None:
                self.quantized_already.append(name)
            sizes = self.groups.setdefault(projection.name, Counter())
            sizes[_name_group(grid.weights_per_scale, w_OI)] += 1
            total = self.codes.setdefault(grid.grid, CodeCount(find_grid(grid.grid)))
            total.add(grid.count)
            bits = grid.count.code_bits() * w_OI.numel() + SCALE_BITS * grid.count.groups
            self.packed_bytes[name] = bits / 8
            return
        self.off_grid.append(name)
        if expected is None:
            return
        wq_OI = fake_quantize_projection(w_OI, projection, self.used)
        self.figures.add(w_OI, wq_OI, expected)
        if self.form == "latent":
            code_bits = CodeCount(find_grid(self.used.quant.grid)).code_bits()
            bits = code_bits * w_OI.numel() + SCALE_BITS * (w_OI.numel() // expected)
            self.packed_bytes[name] = bits / 8

    def _expected_group(
        self, name: str, projection: Projection, w_OI: torch.Tensor, num_layers: int
    ) -> int | None:
        """Return the weights per scale by the quantiser; None where it does not quantise."""
        if not self.used.quantizes(projection, num_layers):
            return None
        try:
            return self.used.weights_per_scale(projection, tuple(w_OI.shape))
        except BitcpmError as error:  # made for other dimensions
            self.misfits[name] = str(error)
            return None

    def _infer(
        self, name: str, projection: Projection, w_OI: torch.Tensor, expected: int | None
    ) -> FoundGrid | None:
        quant, hint = self.used.quant, self._hints.get(projection.name)
        grid = None
        if self.form == "pseudo" and expected is not None:
            # First the stamp's grid: the values of one grid can happen to be on another one too.
            grid = infer_grid(w_OI, quant.eps, hint, self.folded, (quant.grid,))
            if grid is None or grid.weights_per_scale % expected:
                self.disagree.append(name)
        grid = grid or infer_grid(w_OI, quant.eps, hint, self.folded)
        self._hints[projection.name] = grid
        return grid

    def list_problems(self) -> list[str]:
        """Return what contradicts the stamp, as sentences."""
        problems = []
        if self.misfits:
            name, reason = next(iter(self.misfits.items()))
            problems.append(
                f"the stamp does not fit the shapes of {len(self.misfits)} tensors, first "
                f"{name}: {reason}"
            )
        if self.disagree:
            problems.append(
                f"{len(self.disagree)} tensors are not on the grid of the stamp, first "
                f"{self.disagree[0]}"
            )
        if self.quantized_already:
            problems.append(
                f"{len(self.quantized_already)} tensors are on a grid already, and the forward of "
                f"latents quantises them once more, first {self.quantized_already[0]}"
            )
        return problems

    def describe(self) -> dict[str, Any]:
        """Return projections, grids and latents of the report of `inspect`."""
        grids = {}
        for name, count in self.codes.items():
            packed = count.code_bits() + SCALE_BITS * count.groups / count.weights
            grids[name] = {
                "tensors": count.tensors,
                "groups": count.groups,
                "weights": count.weights,
                "zero_fraction": count.codes.get(0, 0) / count.weights,
                "entropy_bits_per_weight": count.entropy_bits(),
                "packed_bits_per_weight": packed,
            }
        latents = None
        if self.off_grid:
            latents = {
                "tensors": len(self.off_grid),
                "first": self.off_grid[0],
                "relative_quantization_error": self.figures.error,
                "description": self.figures.describe(self.used.quant.grid),
            }
        projections = {name: dict(sizes) for name, sizes in self.groups.items()}
        return {"projections": projections, "grids": grids, "latents": latents}


def _name_group(weights_per_scale: int, w_OI: torch.Tensor) -> int | str:
    """Return a group size as it is configured: -1 for a row, ``tensor`` for all of it."""
    if weights_per_scale == w_OI.shape[1]:
        return -1
    return "tensor" if weights_per_scale == w_OI.numel() else weights_per_scale
