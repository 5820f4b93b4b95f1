"""How the codes of a model move and what they cost: statistics of each layer and of the model.

Looks at a fixed sample of whole latent rows, quantised with the very operator and scales of the
forward. Where weights are quantised in place that costs one more rewrite of them.

Shape suffixes: R sampled rows, I input features of the local shard, G groups per row.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_bitcpm import ops
from megatron_bitcpm.arch.tensors import split_layer
from megatron_bitcpm.parallel.convert import TernaryModel
from megatron_bitcpm.parallel.scale_sync import update_given_scales
from megatron_bitcpm.parallel.site import TernarySite

MAX_WEIGHTS = 1_000_000
"""Largest sample of one layer, in weights over all its linears and ranks."""

# Stands for the code of a weight that is not finite: no level of a grid, and equal to itself.
_NO_CODE = 100.0


@dataclass(frozen=True)
class LayerStatistics:
    """What was measured on the sample of one layer, or of the whole model."""

    zero_fraction: float
    """Codes that are 0, of all codes; 0 in grids without that level."""
    flip_fraction: float | None
    """Codes that differ from those of the look before; None at the first look."""
    mean_scale: float
    """Mean over weights of the scale of each, in units of the weight."""
    quant_error: float
    """||w - wq|| / ||w|| (Frobenius) of latents in the model's dtype; NaN if one is not finite."""


@dataclass(frozen=True)
class CodeStatistics:
    """Statistics of one moment, the same on all ranks; global layer numbers, from 0."""

    total: LayerStatistics
    layers: dict[int, LayerStatistics]


class CodeSampler:
    """Compares the codes of the same rows between two moments of training."""

    def __init__(self, ternary: TernaryModel) -> None:
        self._ternary = ternary
        # The sample of a layer is shared by its linears and by the ranks that shard them.
        per_layer = Counter(_layer_of(site) for site in ternary.sites)
        self._rows = {
            id(site): _spread_rows(
                site, MAX_WEIGHTS // (per_layer[_layer_of(site)] * site.quantizer.tp_size)
            )
            for site in ternary.sites
        }
        self._codes_before: dict[int, torch.Tensor] = {}
        self._is_first_look = True

    @torch.no_grad()
    def measure(self) -> CodeStatistics:
        """Look at the weights as they are now, between two steps; collective over all ranks."""
        sites, first_look = self._ternary.sites, self._is_first_look
        self._is_first_look = False
        with self._ternary.latents():
            update_given_scales(sites)
            looks = [self._look_at(site) for site in sites]
        mine: dict[int, list[float]] = {}
        # To the host in one piece: one wait for the device.
        # A pipeline stage may have no ternary linear.
        numbers_of_sites = torch.stack(looks).tolist() if looks else []
        for site, numbers in zip(sites, numbers_of_sites, strict=True):
            mine[_layer_of(site)] = _add(mine.get(_layer_of(site)), numbers)
        layers: dict[int, list[float]] = {}
        for part in _gather_from_model_parallel_ranks(mine):
            for layer, numbers in part.items():
                layers[layer] = _add(layers.get(layer), numbers)
        return CodeStatistics(
            _statistics(functools.reduce(_add, layers.values()), first_look),
            {layer: _statistics(layers[layer], first_look) for layer in sorted(layers)},
        )

    def _look_at(self, site: TernarySite) -> torch.Tensor:
        """Return what `_statistics` takes of one linear's rows, float32, and keep their codes."""
        rows, quant = self._rows[id(site)], site.quantizer.config
        w_RI, wq_RI = site.weight.detach()[rows], site.fake_quantize(site.weight.detach(), rows)
        if site.takes_scales:
            assert site.scales_OG is not None
            scales_RG = site.scales_OG[rows]
        else:
            scales_RG = ops.quantize(w_RI, site.local_group_size, quant.eps, quant.grid)[1]
        codes_RI = _half_levels(wq_RI, scales_RG)
        before_RI = self._codes_before.get(id(site), codes_RI)
        self._codes_before[id(site)] = codes_RI
        # Counts are exact: a sample is far smaller than 2**24.
        numbers = [
            (codes_RI == 0).sum(),
            (codes_RI != before_RI).sum(),
            torch.tensor(codes_RI.numel()),
            # Each scale counts once for each of its weights on this rank.
            scales_RG.sum() * (codes_RI.shape[1] // scales_RG.shape[1]),
            (w_RI.float() - wq_RI.float()).square().sum(),
            w_RI.float().square().sum(),
        ]
        return torch.stack([number.to(w_RI.device, torch.float32) for number in numbers])


def _add(sums: list[float] | None, numbers: list[float]) -> list[float]:
    return [a + b for a, b in zip(sums, numbers, strict=True)] if sums else numbers


def _statistics(numbers: list[float], first_look: bool) -> LayerStatistics:
    zeros, flips, weights, scale, error_squared, norm_squared = numbers
    return LayerStatistics(
        zero_fraction=zeros / weights,
        flip_fraction=None if first_look else flips / weights,
        mean_scale=scale / weights,
        quant_error=0.0 if norm_squared == 0 else math.sqrt(error_squared / norm_squared),
    )


def _half_levels(wq_RI: torch.Tensor, scales_RG: torch.Tensor) -> torch.Tensor:
    """Return the levels of quantised weights in halves of the scale, int8 [R, I]."""
    # Rounding to the weight's type moves the quotient by far less than half a level.
    wq_RGI = wq_RI.float().view(*scales_RG.shape, -1)
    halves_RGI = (wq_RGI / scales_RG.unsqueeze(-1) * 2).round()
    # A level times its scale may overflow the type of the weight.
    halves_RGI = halves_RGI.where(halves_RGI.isfinite(), _NO_CODE)
    return halves_RGI.to(torch.int8).view(wq_RI.shape)


def _gather_from_model_parallel_ranks(
    mine: dict[int, list[float]],
) -> list[dict[int, list[float]]]:
    group = parallel_state.get_model_parallel_group()
    parts: list[dict[int, list[float]]] = [{} for _ in range(group.size())]
    torch.distributed.all_gather_object(parts, mine, group=group)
    return parts


def _layer_of(site: TernarySite) -> int:
    layer, _ = split_layer(site.name)
    assert layer is not None, site.name
    return layer


def _spread_rows(site: TernarySite, max_weights: int) -> torch.Tensor:
    num_rows, row_length = site.weight.shape
    wanted = max(1, min(num_rows, max_weights // row_length))
    return torch.linspace(0, num_rows - 1, wanted, device=site.weight.device).long()
