"""Quantise the model parameters in place, once after each optimizer step.

In mixed precision the latent weights live in the optimizer's fp32 main parameters, from which
Megatron rewrites the bf16 model parameters after each step. Quantised in place, forward, backward
and all overlaps run as if the model were an ordinary one. `every_step_check` says where that holds.
"""

from __future__ import annotations

import torch

from megatron_bitcpm.parallel.requantize.base import Requantizer
from megatron_bitcpm.parallel.site import TernarySite, fake_quantize_sites_


class EveryStep(Requantizer):
    """The model parameters are quantised weights, but for `latents` and right after a rewrite."""

    mode = "every_step"
    runs_on_latents = False

    def _matrix(self, site: TernarySite, weight: torch.Tensor) -> torch.Tensor:
        self._make_fresh(site)
        return weight

    def _bring_up_to_date(self, sites: list[TernarySite]) -> None:
        super()._bring_up_to_date(sites)
        fake_quantize_sites_(sites)

    def _holds_latents(self) -> bool:
        return not any(site.fresh for site in self.sites)

    def _after_rewrite(self) -> None:
        self.refresh()
