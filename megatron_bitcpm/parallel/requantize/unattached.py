"""Before an optimizer is known: quantise in every forward, and choose the strategy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel.agree import first_reason
from megatron_bitcpm.parallel.every_step_check import reason_against_every_step
from megatron_bitcpm.parallel.requantize.base import Requantizer
from megatron_bitcpm.parallel.requantize.strategies import EveryForward, EveryStep
from megatron_bitcpm.parallel.scale_sync import update_given_scales
from megatron_bitcpm.parallel.site import TernarySite

logger = logging.getLogger(__name__)


class Unattached:
    """The state of a model from `ternarize_` until `attach`, for example in evaluation.

    Nobody tells when a weight changes, so nothing is kept from one forward to the next.
    """

    mode = EveryForward.mode

    def __init__(self, sites: list[TernarySite], requested: str) -> None:
        self.sites = sites
        self._requested = requested
        for site in sites:
            site.requantizer = self
            # A load into the linear brings its latent weight back.
            site.module.register_load_state_dict_post_hook(partial(_mark_stale, site))

    def weight_for_forward(self, site: TernarySite, weight: torch.Tensor) -> torch.Tensor:
        """See `SuppliesWeight`."""
        if self._requested == EveryStep.mode and torch.is_grad_enabled():
            raise ModelError(
                "quant.requantize=every_step: the optimizer is not attached. Call attach_optimizer "
                "on what ternarize_ returned before training."
            )
        site.ran = True
        update_given_scales([site])
        return site.fake_quantize(weight)

    @contextmanager
    def latents(self) -> Iterator[None]:
        """See `Requantizer.latents`; the parameters are latent weights all the time."""
        yield

    def attach(self, optimizer: Any) -> Requantizer:
        """Choose the strategy for a Megatron optimizer that has not stepped yet; collective."""
        if self._requested == EveryForward.mode:
            return EveryForward(self.sites, optimizer)
        reason = first_reason(reason_against_every_step(optimizer, self.sites))
        if reason is None:
            return EveryStep(self.sites, optimizer)
        if self._requested == EveryStep.mode:
            raise ModelError(f"quant.requantize=every_step: {reason}. Use every_forward or auto.")
        logger.info("quant.requantize=auto: every_forward, because %s", reason)
        return EveryForward(self.sites, optimizer)


def _mark_stale(site: TernarySite, *_: Any) -> None:
    site.fresh = False
