"""Quantise in the forward of each linear: with any optimizer and type of weight.

Costs one operator for each linear and micro-batch, and again under recomputation. Scales that span
ranks are exchanged once for each optimizer step and kept.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel.requantize.base import Requantizer
from megatron_bitcpm.parallel.site import TernarySite


class EveryForward(Requantizer):
    """The model parameters stay latent weights."""

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
