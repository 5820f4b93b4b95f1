"""What the projections of a model are on, tensor by tensor: the quantiser's part of `inspect`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_bitcpm.arch.tensors import Place
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.codes import CodeCount
from megatron_bitcpm.conversion.infer_grid import FoundGrid, infer_grid
from megatron_bitcpm.conversion.quantization_error import LatentFigures
from megatron_bitcpm.conversion.source import TensorSource
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.settings import TENSOR, WHOLE_ROW
from megatron_bitcpm.quantizer import Quantizer


@dataclass
class ProjectionTotals:
    """Totals over the projections that `add` was given.

    Attributes:
        source: the model.
        groups: name of a projection -> group size as configured -> tensors.
        codes: name of a grid -> totals of the tensors on it.
        off_grid, figures: tensors on no grid, and their quantisation error.
        disagree: tensors whose values are not on the stamp's grid.
        quantized_already: tensors of latents that are on a grid.
        misfits: tensor -> what of the stamp does not fit its shape.
        packed_bytes: tensor -> its bytes with packed codes and float32 scales.
    """

    source: TensorSource
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
    def quantizer(self) -> Quantizer:
        """The model's quantiser; without a stamp the default one, to measure latents with."""
        return self.source.quantizer or Quantizer(QuantConfig())

    def add(self, name: str, place: Place, w_OI: torch.Tensor) -> None:
        """Add a projection, [O, I], finite and not all 0."""
        expected = self._expected_group(name, place, w_OI)
        found = self._infer(name, place, w_OI, expected)
        is_latent = self.source.form == "latent"
        if found is not None:
            if is_latent and expected is not None:
                self.quantized_already.append(name)
            sizes = self.groups.setdefault(place.local_hf, Counter())
            sizes[_name_group(found.weights_per_scale, w_OI)] += 1
            self.codes.setdefault(found.grid.name, CodeCount(found.grid)).add(found.count)
            self.packed_bytes[name] = found.count.packed_bytes()
            return
        self.off_grid.append(name)
        if expected is None:
            return
        self.figures.add(w_OI, self.quantizer.values(w_OI, place.spec), expected)
        if is_latent:
            groups = w_OI.numel() // expected
            count = CodeCount(self.quantizer.grid, 1, groups, w_OI.numel())
            self.packed_bytes[name] = count.packed_bytes()

    def _expected_group(self, name: str, place: Place, w_OI: torch.Tensor) -> int | None:
        """Return the weights per scale by the quantiser; None where it does not quantise."""
        if not self.quantizer.quantizes(place, self.source.num_layers):
            return None
        try:
            return self.quantizer.weights_per_scale(place, tuple(w_OI.shape))
        except BitcpmError as error:  # made for other dimensions
            self.misfits[name] = str(error)
            return None

    def _infer(
        self, name: str, place: Place, w_OI: torch.Tensor, expected: int | None
    ) -> FoundGrid | None:
        eps, hint = self.quantizer.config.eps, self._hints.get(place.local_hf)
        folded = self.source.folding is not None
        found = None
        if self.source.form == "pseudo" and expected is not None:
            # First the stamp's grid: the values of one grid can happen to be on another one too.
            found = infer_grid(w_OI, eps, hint, folded, [self.quantizer.grid])
            if found is None or found.weights_per_scale % expected:
                self.disagree.append(name)
        found = found or infer_grid(w_OI, eps, hint, folded)
        self._hints[place.local_hf] = found
        return found

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
        latents = None
        if self.off_grid:
            latents = {
                "tensors": len(self.off_grid),
                "first": self.off_grid[0],
                "relative_quantization_error": self.figures.error,
                "description": self.figures.describe(self.quantizer.grid),
            }
        return {
            "projections": {name: dict(sizes) for name, sizes in self.groups.items()},
            "grids": {
                name: {
                    "tensors": count.tensors,
                    "groups": count.groups,
                    "weights": count.weights,
                    **count.describe(),
                }
                for name, count in self.codes.items()
            },
            "latents": latents,
        }


def _name_group(weights_per_scale: int, w_OI: torch.Tensor) -> int | str:
    """Return a group size as it is configured."""
    if weights_per_scale == w_OI.shape[1]:
        return WHOLE_ROW
    return TENSOR if weights_per_scale == w_OI.numel() else weights_per_scale
