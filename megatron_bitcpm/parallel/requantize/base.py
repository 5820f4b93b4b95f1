"""What all strategies share: which weights are up to date, and how latents come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.parallel.optimizer_parts import (
    keep_adam_steps_apart,
    model_chunks,
    rewrite_model_params,
)
from megatron_bitcpm.parallel.scale_sync import update_given_scales
from megatron_bitcpm.parallel.site import TernarySite


@dataclass(eq=False)
class Unit:
    """Sites whose weights complete together: a bucket group where gathers overlap, else all."""

    sites: list[TernarySite] = field(default_factory=list)
    bucket_group: Any = None


class Requantizer(ABC):
    """The quantisation state of a model's ternary linears; follows the optimizer from the start.

    A subclass is a strategy: it fills in the first few methods and leaves the flags alone.
    """

    mode: str
    runs_on_latents = True
    """Whether a forward and a step may come while the parameters must stay latent weights."""

    def __init__(self, sites: list[TernarySite], optimizer: Any) -> None:
        self.sites = sites
        self._optimizer = optimizer
        self._everything = Unit(sites)
        self._units = _find_units(optimizer, sites)
        self._is_in_latents = False
        for site in sites:
            site.requantizer = self
        self._mark_stale()
        keep_adam_steps_apart(optimizer)
        optimizer.step = self._follow_step(optimizer.step)
        optimizer.reload_model_params = self._guard_reload(optimizer.reload_model_params)

    @abstractmethod
    def _matrix(self, site: TernarySite, weight: torch.Tensor) -> torch.Tensor:
        """Return the matrix for the GEMM of one linear, [O, I]."""

    def _bring_up_to_date(self, sites: list[TernarySite]) -> None:
        """Derive from latent weights what the forward needs; collective over the tensor ranks."""
        update_given_scales(sites)

    @abstractmethod
    def _after_rewrite(self) -> None:
        """Do what is due when all model parameters are latent weights again."""

    def _holds_latents(self) -> bool:
        """Whether all ternary model parameters are latent weights now."""
        return True

    def weight_for_forward(self, site: TernarySite, weight: torch.Tensor) -> torch.Tensor:
        """See `SuppliesWeight`."""
        self._refuse_within_latents("forward")
        site.ran = True
        return self._matrix(site, weight)

    def refresh(self) -> None:
        """Bring all weights up to date; collective over the tensor-parallel group."""
        # Where gathers overlap with the forward, only there is a bucket known to be complete.
        if not self._units:
            self._refresh(self._everything)

    def _make_fresh(self, site: TernarySite) -> None:
        if not site.fresh:
            self._refresh(self._units.get(id(site), self._everything))

    def _refuse_within_latents(self, call: str) -> None:
        if self._is_in_latents and not self.runs_on_latents:
            raise ModelError(
                f"latents=({call}): the model holds latent weights inside this block. Leave the "
                "block first."
            )

    @torch.no_grad()
    def _refresh(self, unit: Unit) -> None:
        stale = [site for site in unit.sites if not site.fresh]
        if not stale:
            return
        in_flight = unit.bucket_group is not None and unit.bucket_group.param_gather_handle
        assert not in_flight, f"{stale[0].name}: its parameter gather has not finished"
        self._bring_up_to_date(stale)
        for site in stale:
            site.fresh = True

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
                for site in self.sites:
                    site.ran = False
                self._mark_stale()
                self._after_rewrite()
            return result

        return followed

    def _mark_stale(self) -> None:
        for site in self.sites:
            site.fresh = False

    def _guard_reload(self, reload: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if not self._holds_latents():
                raise ModelError(
                    "reload_model_params=(called): the model parameters hold quantised values, "
                    "which would replace the latents. Load the latent weights into the model first."
                )
            return reload(*args, **kwargs)

        return guarded

    @contextmanager
    def latents(self) -> Iterator[None]:
        """Hold the latent weights in the model parameters during a block; collective, may nest.

        In place, because sharded optimizer states find parameters by identity.
        """
        if self._is_in_latents:
            yield
            return
        # With overlapped gathers the parameters are incomplete until the next forward.
        if self._units or not self._holds_latents():
            self._restore_latents()
        self._is_in_latents = True
        try:
            yield
        finally:
            self._is_in_latents = False
            # The block may have edited the weights: cached scales would be those of the old ones.
            self._mark_stale()
        # Not in the `finally`: after an error on one rank a collective would hang the others, and
        # stale latents are a consistent state.
        self._after_rewrite()

    @torch.no_grad()
    def _restore_latents(self) -> None:
        for unit in self._units.values():
            if unit.bucket_group.param_gather_handle is not None:
                unit.bucket_group.finish_param_sync(skip_next_bucket_dispatch=True)
        rewrite_model_params(self._optimizer)
        self._mark_stale()


def _find_units(optimizer: Any, sites: list[TernarySite]) -> dict[int, Unit]:
    """Return id(site) -> its bucket group, where parameter gathers overlap with the forward."""
    by_site: dict[int, Unit] = {}
    by_group: dict[int, Unit] = {}
    for chunk in model_chunks(optimizer):
        if not getattr(chunk.ddp_config, "overlap_param_gather", False):
            continue
        for site in sites:
            group = chunk.param_to_bucket_group.get(site.weight)
            if group is not None:
                unit = by_group.setdefault(id(group), Unit(bucket_group=group))
                unit.sites.append(site)
                by_site[id(site)] = unit
    return by_site
