"""How the codes of a model move: fraction of zeros, fraction flipped since the last look.

Looks at a fixed sample of whole rows, at most `MAX_WEIGHTS` weights of each linear, so that its
cost does not grow with the model.
"""

from __future__ import annotations

import torch

from megatron_bitcpm.parallel.convert import TernaryModel
from megatron_bitcpm.parallel.linear import TernarySite

MAX_WEIGHTS = 1_000_000
"""Largest sample of one linear, in weights of this rank."""


class CodeSampler:
    """Compares the codes of the same rows between two moments of training."""

    def __init__(self, ternary: TernaryModel) -> None:
        self._ternary = ternary
        self._rows = {id(site): _spread_rows(site) for site in ternary.sites}
        self._before: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def measure(self) -> tuple[float, float | None]:
        """Return (zero fraction, fraction flipped since the last call; None at the first).

        Collective over the model-parallel ranks: every rank returns the same numbers.
        """
        from megatron.core import parallel_state

        self._ternary.requantizer.refresh()
        before, self._before = self._before, {}
        counts = torch.zeros(3, dtype=torch.float64)
        for site in self._ternary.sites:
            codes_OI = self._codes(site)
            self._before[id(site)] = codes_OI
            zeros = int((codes_OI == 0).sum())
            flips = int((codes_OI != before[id(site)]).sum()) if before else 0
            counts += torch.tensor([zeros, flips, codes_OI.numel()], dtype=torch.float64)
        device = self._ternary.sites[0].weight.device
        counts = counts.to(device)
        torch.distributed.all_reduce(counts, group=parallel_state.get_model_parallel_group())
        zeros_sum, flips_sum, total = counts.tolist()
        return zeros_sum / total, flips_sum / total if before else None

    def _codes(self, site: TernarySite) -> torch.Tensor:
        rows = self._rows[id(site)]
        w_OI = site.weight.detach()
        if self._ternary.requantizer.mode == "every_forward" or not site.fresh:
            # One call for the whole weight: its scales may be shared with other ranks.
            w_OI = site.fake_quantize(w_OI)
        return w_OI[rows].sign().to(torch.int8)


def _spread_rows(site: TernarySite) -> torch.Tensor:
    num_rows, row_length = site.weight.shape
    wanted = max(1, min(num_rows, MAX_WEIGHTS // row_length))
    return torch.linspace(0, num_rows - 1, wanted, device=site.weight.device).long()
