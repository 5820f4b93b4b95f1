"""When a ternary weight is quantised: two modes, one result.

``every_forward`` quantises in the forward of each linear. ``every_step`` uses that in mixed
precision the latent weights live in the optimizer's fp32 main parameters, from which Megatron
rewrites the bf16 model parameters after each step: the model parameters are then quantised in
place, once, and forward, backward and all overlaps run as if the model were an ordinary one.

Quantising is not idempotent, so it may happen only after a *real* rewrite: not after a skipped
step, not when a gather repeats, not on a bucket whose gather is in flight. The state is a flag
per weight (`TernarySite.fresh`), cleared by the only three things that bring latents back or let
them be edited: a successful `optimizer.step`, a load, and `latents`. The one symbol of Megatron
that is wrapped, on the instance, is the outermost `optimizer.step`; everything else hangs on the
linear's own forward, which runs after all of Megatron's hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel.adam_step import keep_adam_steps_apart
from megatron_bitcpm.parallel.agree import first_reason
from megatron_bitcpm.parallel.every_step_check import (
    model_chunks,
    reason_against_every_step,
    rewrite_model_params,
)
from megatron_bitcpm.parallel.linear import TernarySite, fake_quantize_sites_
from megatron_bitcpm.parallel.scale_sync import update_given_scales

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Unit:
    """Sites whose weights become complete together.

    With overlapped parameter gathers that is one of Megatron's bucket groups, otherwise all sites.
    """

    sites: list[TernarySite]
    bucket_group: Any = None


class Requantizer:
    """The quantisation state of all ternary linears of a model (on this rank).

    Attributes:
        requested: ``auto``, ``every_step`` or ``every_forward``.
        mode: what is in force; ``every_forward`` until `attach_optimizer` finds in place safe.
        sites: the ternary linears, in forward order.
    """

    def __init__(self, requested: str) -> None:
        self.requested = requested
        self.mode = "every_forward"
        self.sites: list[TernarySite] = []
        self._optimizer: Any = None
        self._all = _Unit(self.sites)
        self._units: dict[int, _Unit] = {}
        self._latents_depth = 0

    def add_site(self, site: TernarySite) -> None:
        """Register a ternary linear; a load into it brings latents back."""
        self.sites.append(site)

        def mark_loaded(module: torch.nn.Module, incompatible_keys: Any) -> None:
            del module, incompatible_keys
            site.fresh = False

        site.module.register_load_state_dict_post_hook(mark_loaded)

    # -- forward ---------------------------------------------------------------------------------

    def weight_for_forward(self, site: TernarySite, weight: torch.Tensor) -> torch.Tensor:
        """Return the matrix for the GEMM of one linear.

        Args:
            site: the linear.
            weight: what Megatron passes: the module's parameter, float [O, I].
        """
        if self._optimizer is None and self.requested == "every_step" and torch.is_grad_enabled():
            raise ModelError(
                "quant.requantize=every_step: the optimizer is not attached. Call attach_optimizer "
                "on what ternarize_ returned before training."
            )
        self._refuse_within_latents("forward")
        site.ran = True
        if self.mode == "every_step":
            if not site.fresh:
                self._refresh(self._unit_of(site))
            return weight
        if site.takes_scales:
            if self._optimizer is None:
                # Nobody tells when the weight changes, so the scales cannot be kept.
                update_given_scales([site])
            elif not site.fresh:
                self._refresh(self._unit_of(site))
        return site.fake_quantize(weight)

    def _refuse_within_latents(self, call: str) -> None:
        if self._latents_depth and self.mode == "every_step":
            raise ModelError(
                f"latents=({call}): the model holds latent weights inside this block. Leave the "
                "block first."
            )

    def _unit_of(self, site: TernarySite) -> _Unit:
        return self._units.get(id(site), self._all)

    def refresh(self) -> None:
        """Bring all weights up to date; collective over the tensor-parallel group.

        While parameter gathers overlap with the forward this does nothing: only there is a bucket
        known to be complete.
        """
        if not self._units:
            self._refresh(self._all)

    @torch.no_grad()
    def _refresh(self, unit: _Unit) -> None:
        stale = [site for site in unit.sites if not site.fresh]
        if not stale:
            return
        in_flight = unit.bucket_group is not None and unit.bucket_group.param_gather_handle
        assert not in_flight, f"{stale[0].name}: its parameter gather has not finished"
        update_given_scales(stale)
        if self.mode == "every_step":
            fake_quantize_sites_(stale)
        for site in stale:
            site.fresh = True

    # -- optimizer -------------------------------------------------------------------------------

    def attach_optimizer(self, optimizer: Any) -> None:
        """Choose the mode for this optimizer and follow its steps.

        Call once, after the optimizer was built and before the first forward.

        Args:
            optimizer: what `get_megatron_optimizer` returned.

        Raises:
            ModelError: ``every_step`` was requested and this optimizer cannot do it.
        """
        assert self._optimizer is None, "one optimizer per model"
        reason = None
        if self.requested != "every_forward":
            reason = first_reason(reason_against_every_step(optimizer, self.sites))
            if reason and self.requested == "every_step":
                raise ModelError(
                    f"quant.requantize=every_step: {reason}. Use every_forward or auto."
                )
            if reason:
                logger.info("quant.requantize=auto: every_forward, because %s", reason)
            else:
                self.mode = "every_step"
        if self.mode == "every_forward":
            self._refuse_accumulation_fusion()
        self._optimizer = optimizer
        self._find_units(optimizer)
        for site in self.sites:
            site.fresh = False
        keep_adam_steps_apart(optimizer)
        optimizer.step = self._follow_step(optimizer.step)
        optimizer.reload_model_params = self._guard_reload(optimizer.reload_model_params)

    def _refuse_accumulation_fusion(self) -> None:
        for site in self.sites:
            if getattr(site.module, "gradient_accumulation_fusion", False):
                raise ModelError(
                    "gradient_accumulation_fusion=True: the fused kernel needs a leaf weight, "
                    "which every_forward has not. Switch it off, or use "
                    "quant.requantize=every_step."
                )

    def _find_units(self, optimizer: Any) -> None:
        """Group the sites by bucket group where parameter gathers overlap with the forward."""
        units: dict[int, _Unit] = {}
        for chunk in model_chunks(optimizer):
            if not getattr(chunk.ddp_config, "overlap_param_gather", False):
                continue
            for site in self.sites:
                group = chunk.param_to_bucket_group.get(site.weight)
                if group is not None:
                    unit = units.setdefault(id(group), _Unit([], group))
                    unit.sites.append(site)
                    self._units[id(site)] = unit

    def _follow_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def followed(*args: Any, **kwargs: Any) -> Any:
            self._refuse_within_latents("step")
            idle = [site.name for site in self.sites if not site.ran]
            if idle:
                raise ModelError(
                    f"model={idle[0]}: {len(idle)} of {len(self.sites)} ternary linears did not "
                    "run since the last step, so they would train unquantised. Exclude them "
                    "(quant.exclude) or use a model that calls them."
                )
            result = step(*args, **kwargs)
            if result[0]:
                self._mark_rewritten()
                if self.mode == "every_step":
                    self.refresh()
            return result

        return followed

    def _mark_rewritten(self) -> None:
        for site in self.sites:
            site.fresh = False
            site.ran = False

    def _guard_reload(self, reload: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.mode == "every_step" and any(site.fresh for site in self.sites):
                raise ModelError(
                    "reload_model_params=(called): the model parameters hold quantised values, "
                    "which would replace the latents. Load the latent weights into the model first."
                )
            return reload(*args, **kwargs)

        return guarded

    # -- latents ---------------------------------------------------------------------------------

    @contextmanager
    def latents(self) -> Iterator[None]:
        """Hold the latent weights in the model parameters for the duration of a block.

        For saving, exporting and converting; in place, because sharded optimizer states find
        parameters by identity. Collective over all ranks; may be nested.

        Raises:
            ModelError: a forward or a step inside the block (``every_step``).
        """
        if self._latents_depth:
            yield
            return
        quantised = self.mode == "every_step" and any(site.fresh for site in self.sites)
        # With overlapped gathers the parameters are incomplete until the next forward, in any mode.
        if quantised or self._units:
            self._restore_latents()
        self._latents_depth = 1
        try:
            yield
        finally:
            self._latents_depth = 0
            # The block may have edited the weights: cached scales would be those of the old ones.
            for site in self.sites:
                site.fresh = False
        # Not in the `finally`: after an error on one rank a collective would hang the others, and
        # stale latents are a consistent state.
        if self.mode == "every_step":
            self.refresh()

    @torch.no_grad()
    def _restore_latents(self) -> None:
        for unit in self._units.values():
            if unit.bucket_group.param_gather_handle is not None:
                unit.bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)
        rewrite_model_params(self._optimizer)
        for site in self.sites:
            site.fresh = False
