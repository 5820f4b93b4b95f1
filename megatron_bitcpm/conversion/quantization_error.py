"""Whether latent weights were trained on their grid: two figures of the weights alone.

    error      ||w - wq||^2 / ||w||^2
    crowding   density of |w| / s at the rounding threshold, relative to its surroundings

The error is what quantising takes away. It tells little about the training: Gaussian weights have
0.263 on the ternary grid with one scale per row, uniform ones 0.16, Laplacian ones 0.39; a trained
SmolLM2-135M 0.279; 4.7 M weights of a byte-level model after 800 steps without quantiser 0.262, and
after 800 steps with one 0.272. A small error (below `SMALL_ERROR`) does say that the weights lie
near the ternary grid; finer grids have one on any weights.

Crowding tells more. Under a straight-through gradient a weight is pushed across the threshold
|w| = s / 2 and back, so that weights gather there: 1.04 after 200 and 1.11 after 800 steps of that
same model, against 0.99 to 1.01 for all the others. Neither figure proves anything: a short
training leaves no trace, and then, as on the other grids, only a stamp tells.

Shape legend: O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.conversion.codes import count_not_finite
from megatron_bitcpm.conversion.infer_grid import lies_on_grid
from megatron_bitcpm.conversion.source import TensorSource
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quant.grids import Grid

SMALL_ERROR = 0.1
CROWDING = 1.05
_HALF_WIDTH = 0.05
_SAMPLE = 1 << 20
"""Weights of a tensor that are looked at, about: enough for three digits of both figures."""
_BLOCK = 1 << 18


@dataclass
class LatentFigures:
    """Sums over rows of quantised tensors, and the figures that follow.

    Attributes:
        lost, total: sums of (w - wq)^2 and of w^2.
        at_threshold, beside: weights with |w| / s within 0.05 of 0.5; 0.1 to 0.2 away from it.
    """

    lost: float = 0.0
    total: float = 0.0
    at_threshold: int = 0
    beside: int = 0

    def add(self, w_OI: torch.Tensor, wq_OI: torch.Tensor, weights_per_scale: int) -> None:
        """Add latents and their values on the grid, [O, I]; of large ones rows from all over."""
        whole = weights_per_scale > w_OI.shape[1]
        scale = w_OI.abs().mean(dtype=torch.float32) if whole else None
        step = max(1, w_OI.numel() // _SAMPLE)
        w_OI, wq_OI = w_OI[::step], wq_OI[::step]
        rows = max(1, _BLOCK // w_OI.shape[1])
        for w, wq in zip(torch.split(w_OI, rows), torch.split(wq_OI, rows), strict=True):
            latent = w.float()
            self.lost += float((latent - wq.float()).square_().sum())
            self.total += float(latent.square().sum())
            # A new tensor: of a float32 weight `latent` is the weight itself.
            magnitude = latent.abs()
            if scale is None:
                magnitude = magnitude.reshape(-1, weights_per_scale)
                magnitude /= magnitude.mean(-1, keepdim=True).clamp_(min=1e-30)
            else:
                magnitude /= scale.clamp(min=1e-30)
            distance = magnitude.sub_(0.5).abs_()
            self.at_threshold += int((distance < _HALF_WIDTH).sum())
            self.beside += int(((distance >= 2 * _HALF_WIDTH) & (distance < 4 * _HALF_WIDTH)).sum())

    @property
    def error(self) -> float:
        """Relative quantisation error, 0 to 1."""
        return self.lost / self.total if self.total else 0.0

    @property
    def crowding(self) -> float:
        """Density at the threshold relative to its surroundings; 1 where nothing is known."""
        return 2 * self.at_threshold / self.beside if self.beside else 1.0

    def looks_trained(self, grid: Grid) -> bool:
        """Whether the weights show a training on their grid."""
        return grid.is_ternary and (self.error < SMALL_ERROR or self.crowding >= CROWDING)

    def describe(self, grid: Grid) -> str:
        """Return the figures in words, and what they are to be compared with."""
        text = f"relative quantisation error {self.error:.3f}"
        if not grid.is_ternary:
            return f"{text}, which tells nothing about a training on this grid"
        return (
            f"{text} (Gaussian weights 0.263), density at the rounding threshold "
            f"{self.crowding:.3f} (untrained 0.99 to 1.01, trained {CROWDING} or more)"
        )


def measure_latents(source: TensorSource) -> LatentFigures:
    """Measure the first, the middle and the last layer of a latent model."""
    figures, groups = LatentFigures(), source.quantized_tensors()
    for name in _sample(source):
        figures.add(source.tensor(name), source.forward_tensor(name), groups[name])
    return figures


def _sample(source: TensorSource) -> Iterator[str]:
    """Yield the quantised tensors of the first, the middle and the last layer."""
    layers = {0, source.num_layers // 2, source.num_layers - 1}
    for name in source.quantized_tensors():
        place = find_projection(name)
        if place is not None and place.layer in layers:
            yield name


def check_trained(source: TensorSource, field: str, force: bool) -> list[str]:
    """Refuse latents without a stamp that show no training on the grid that was named for them.

    `field` is the argument that named the model. With `force` the message is returned as a warning.

    Raises:
        CheckpointError: see above; also a NaN, or weights that were quantised already.
    """
    check_latents(source, field)
    assert source.quantizer is not None
    grid, figures = source.quantizer.grid, measure_latents(source)
    if figures.looks_trained(grid):
        return []
    rule = f"holds weights that show no training on the {grid.name} grid: {figures.describe(grid)}"
    if not force:
        raise CheckpointError(
            f"{field}={source.path}: {rule}, and no stamp says otherwise. Add --force if a "
            "quantiser did train them; any other model is destroyed."
        )
    return [f"{source.path} {rule}"]


def check_latents(source: TensorSource, field: str) -> None:
    """Refuse latents with a NaN, or quantised already: their scales would become other ones."""
    assert source.quantizer is not None
    for name in _sample(source):
        w_OI = source.tensor(name)
        check_finite(name, w_OI, f"{field}={source.path}")
        check_off_grid(name, w_OI, source.quantizer.config.eps, f"{field}={source.path}")


def check_off_grid(name: str, w_OI: torch.Tensor, eps: float, place: str) -> None:
    """Refuse a weight that was quantised already; `place` as for `check_finite`."""
    if lies_on_grid(w_OI, eps):
        raise CheckpointError(
            f"{place}: {name} lies on a grid already: it was quantised before, and quantising "
            "again changes it. Name the latent weights."
        )


def check_finite(name: str, tensor: torch.Tensor, place: str) -> None:
    """Refuse a tensor with a NaN or an infinity; `place` is the ``field=value`` of its model."""
    if tensor.dtype.is_floating_point and count_not_finite(tensor):
        row = int((~tensor.isfinite()).nonzero()[0][0]) if tensor.ndim else 0
        raise CheckpointError(
            f"{place}: {name} holds a NaN or an infinity, first in row {row}. The training had "
            "diverged; use an earlier checkpoint."
        )
