"""How the codes of a model move: fraction of zeros, fraction flipped since the last look.

Looks at a fixed sample of whole rows, at most `MAX_WEIGHTS` weights of each layer, so that its cost
does not grow with the width of the model.
"""

from __future__ import annotations

from collections import Counter

import torch

from megatron_bitcpm.parallel.convert import TernaryModel
from megatron_bitcpm.parallel.linear import TernarySite

MAX_WEIGHTS = 1_000_000
"""Largest sample of one layer, in weights over all its linears and ranks."""


class CodeSampler:
    """Compares the codes of the same rows between two moments of training."""

    def __init__(self, ternary: TernaryModel) -> None:
        self._ternary = ternary
        # The sample of a layer is shared by its linears and by the ranks that shard them.
        per_layer = Counter(_layer_of(site) for site in ternary.sites)
        self._rows = {
            id(site): _spread_rows(site, MAX_WEIGHTS // (per_layer[_layer_of(site)] * site.tp_size))
            for site in ternary.sites
        }
        self._before: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def measure(self) -> tuple[float | None, float | None]:
        """Return (zero fraction, fraction flipped since the last call; None at the first).

        Collective over the model-parallel ranks: every rank returns the same numbers. While
        parameter gathers overlap with the forward the weights are incomplete between steps, and
        both are None.
        """
        from megatron.core import parallel_state

        requantizer, sites = self._ternary.requantizer, self._ternary.sites
        requantizer.refresh()
        if not all(site.fresh for site in sites):
            return None, None
        before, self._before = self._before, {}
        counts = torch.zeros(3, dtype=torch.int64, device=sites[0].weight.device)
        for site in sites:
            rows, w_OI = self._rows[id(site)], site.weight.detach()
            in_place = requantizer.mode == "every_step"
            codes_OI = (w_OI[rows] if in_place else site.fake_quantize(w_OI, rows)).sign()
            self._before[id(site)] = codes_OI
            counts[0] += (codes_OI == 0).sum()
            counts[1] += (codes_OI != before[id(site)]).sum() if before else 0
            counts[2] += codes_OI.numel()
        torch.distributed.all_reduce(counts, group=parallel_state.get_model_parallel_group())
        zeros, flips, total = counts.tolist()
        return zeros / total, flips / total if before else None


def _layer_of(site: TernarySite) -> str:
    return ".".join(site.name.split(".")[:3])


def _spread_rows(site: TernarySite, max_weights: int) -> torch.Tensor:
    num_rows, row_length = site.weight.shape
    wanted = max(1, min(num_rows, max_weights // row_length))
    return torch.linspace(0, num_rows - 1, wanted, device=site.weight.device).long()
