"""The strategies: quantise in each forward, or in place after each optimizer step."""

from __future__ import annotations

from typing import Any

import torch

from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel.requantize.base import Requantizer
from megatron_bitcpm.parallel.site import TernarySite, fake_quantize_sites_


class EveryForward(Requantizer):
    """The model parameters stay latent weights: works with any optimizer and type of weight.

    Costs one operator for each linear and micro-batch, and again under recomputation. Scales that
    span ranks are exchanged once for each optimizer step and kept.
    """

    mode = "every_forward"

    def __init__(self, sites: list[TernarySite], optimizer: Any) -> None:
        if any(getattr(site.module, "gradient_accumulation_fusion", False) for site in sites):
            raise ModelError(
                "gradient_accumulation_fusion=True: the fused kernel needs a leaf weight, "
                "which every_forward does not have. Switch it off, or use "
                "quant.requantize=every_step."
            )
        super().__init__(sites, optimizer)

    def _matrix(self, site: TernarySite, weight: torch.Tensor) -> torch.Tensor:
        if site.takes_scales:
            self._make_fresh(site)
        return site.fake_quantize(weight)

    def _after_rewrite(self) -> None:
        """Leave it to the next forward."""


class EveryStep(Requantizer):
    """The model parameters are quantised weights, but for `latents` and right after a rewrite.

    The latent weights live in the optimizer's fp32 main parameters, from which Megatron rewrites
    the bf16 model parameters after each step. `every_step_check` says where that holds.
    """

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
