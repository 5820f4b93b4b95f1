"""Notices a run that has gone wrong: losses or gradients that are not finite, and loss spikes.

The guard only decides; the trainer stops or rolls back. It sees nothing but numbers that all ranks
share, so all ranks decide alike.

    non-finite   `max_skipped_steps` steps in a row were not taken, or had a loss that is not finite
    spike        `max_spikes` losses in a row, each more than `loss_spike_threshold` nats above the
                 median of the last `loss_spike_window` good losses

Spikes and losses that are not finite never enter the window, so a diverged run cannot become the
norm. A skipped step with a finite loss is judged by its loss like any other. A loss that is not
finite neither continues nor ends a row of spikes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from megatron_bitcpm.config import GuardConfig
from megatron_bitcpm.errors import TrainingError


@dataclass(frozen=True)
class Verdict:
    """What the guard says after a step.

    Attributes:
        act: stop or roll back now.
        spike: this step's loss was a spike.
        reason: of `act`, one sentence without a full stop; empty otherwise.
        field: configuration key whose limit was reached; empty otherwise.
        limit: its value.
    """

    act: bool = False
    spike: bool = False
    reason: str = ""
    field: str = ""
    limit: int = 0


class LossGuard:
    """Judges one step after the other; the state can be saved and restored.

    Attributes:
        skipped_in_a_row: steps up to now without a usable update.
        spikes_in_a_row: spikes up to now.
        rollbacks: how often the run went back.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._window: deque[float] = deque(maxlen=config.loss_spike_window)
        self.skipped_in_a_row = 0
        self.spikes_in_a_row = 0
        self.rollbacks = 0

    def observe(self, iteration: int, loss: float, step_taken: bool) -> Verdict:
        """Judge one step; call it once for each, in order, on all ranks with the same numbers.

        Args:
            iteration: number of the step, from 1.
            loss: its mean loss over all ranks, nats per token.
            step_taken: whether the optimizer updated the weights.
        """
        finite = math.isfinite(loss)
        usable = finite and step_taken
        self.skipped_in_a_row = 0 if usable else self.skipped_in_a_row + 1
        norm = self._norm()
        spike = finite and norm is not None and loss > norm + self._threshold
        if finite:
            self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if finite and not spike:
            self._window.append(loss)
        if self.skipped_in_a_row >= self._config.max_skipped_steps:
            return self._act_on_skips(iteration, spike)
        if spike and self.spikes_in_a_row >= self._config.max_spikes:
            return self._act_on_spikes(iteration, loss, norm)
        return Verdict(spike=spike)

    @property
    def _threshold(self) -> float:
        threshold = self._config.loss_spike_threshold
        return math.inf if threshold is None else threshold

    def _norm(self) -> float | None:
        """The median of the window, None until it is full."""
        if len(self._window) < self._config.loss_spike_window:
            return None
        return statistics.median(self._window)

    def _act_on_skips(self, iteration: int, spike: bool) -> Verdict:
        count = self.skipped_in_a_row
        return Verdict(
            act=True,
            spike=spike,
            reason=f"{count} step(s) in a row had a non-finite loss or gradient, the last was step "
            f"{iteration}",
            field="guard.max_skipped_steps",
            limit=self._config.max_skipped_steps,
        )

    def _act_on_spikes(self, iteration: int, loss: float, norm: float | None) -> Verdict:
        return Verdict(
            act=True,
            spike=True,
            reason=f"{self.spikes_in_a_row} loss spike(s) in a row, the last at step {iteration}: "
            f"{loss:.4f} is more than {self._config.loss_spike_threshold} above the median "
            f"{norm:.4f} of the last {self._config.loss_spike_window} good losses",
            field="guard.max_spikes",
            limit=self._config.max_spikes,
        )

    @property
    def in_trouble(self) -> bool:
        """Whether the last step was bad: a checkpoint of now would be a bad place to return to."""
        return self.skipped_in_a_row > 0 or self.spikes_in_a_row > 0

    def begin_rollback(self, verdict: Verdict) -> None:
        """Count one more rollback, or stop the run; call it after a verdict with `act`.

        After it returns the trainer loads the newest checkpoint and calls `rewind` with the guard's
        state there.

        Raises:
            TrainingError: the run stops, by configuration or because it went back often enough.
        """
        config = self._config
        if config.action == "stop":
            raise TrainingError(
                f"{verdict.field}={verdict.limit}: {verdict.reason}. Lower optimizer.lr, resume "
                "from an earlier checkpoint, or use guard.action=rollback."
            )
        if self.rollbacks >= config.max_rollbacks:
            raise TrainingError(
                f"guard.max_rollbacks={config.max_rollbacks}: after {self.rollbacks} rollback(s) "
                f"the run went wrong again: {verdict.reason}. Lower optimizer.lr, or resume from "
                "an earlier checkpoint."
            )
        self.rollbacks += 1

    def rewind(self, state: dict[str, Any]) -> None:
        """Take the window of a checkpoint; rows start anew and rollbacks stay counted.

        Args:
            state: what `state` returned when the checkpoint was written.
        """
        self._window = deque(state["window"], maxlen=self._config.loss_spike_window)
        self.skipped_in_a_row = self.spikes_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, numbers and one list of numbers."""
        return {
            "window": list(self._window),
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes_in_a_row": self.spikes_in_a_row,
            "rollbacks": self.rollbacks,
        }

    @classmethod
    def from_state(cls, config: GuardConfig, state: dict[str, Any]) -> LossGuard:
        """Return a guard that goes on where another one was.

        Args:
            config: may differ from the other guard's; a smaller window keeps its newest losses.
            state: from `state`.
        """
        guard = cls(config)
        guard.rewind(state)
        guard.skipped_in_a_row = state["skipped_in_a_row"]
        guard.spikes_in_a_row = state["spikes_in_a_row"]
        guard.rollbacks = state["rollbacks"]
        return guard
