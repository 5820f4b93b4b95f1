"""Notices a run that has gone wrong: losses or gradients that are not finite, and loss spikes.

It sees only numbers that all ranks share, and only decides: the trainer stops or rolls back.

    non-finite   `max_skipped_steps` steps in a row were not taken, or had a loss that is not finite
    spike        `max_spikes` losses in a row, each more than `loss_spike_threshold` nats above the
                 median of the last `loss_spike_window` good losses

Spikes and losses that are not finite never enter the window, so a diverged run cannot become the
norm. A loss that is not finite neither continues nor ends a row of spikes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from megatron_bitcpm.config import GuardConfig
from megatron_bitcpm.errors import TrainingError

_COUNTERS = ("skipped_in_a_row", "spikes_in_a_row", "rollbacks")


@dataclass(frozen=True)
class Verdict:
    """What the guard says after a step."""

    spike: bool = False
    limit: str = ""
    """The setting that says to stop or roll back now, as ``key=value``."""
    reason: str = ""

    @property
    def act(self) -> bool:
        """Whether to stop or roll back now."""
        return bool(self.limit)


class LossGuard:
    """Judges one step after the other; the state can be saved and restored."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._window: deque[float] = deque(maxlen=config.loss_spike_window)
        self.skipped_in_a_row = 0
        self.spikes_in_a_row = 0
        self.rollbacks = 0

    def observe(self, iteration: int, loss: float, step_taken: bool) -> Verdict:
        """Judge the next step by its loss, the mean over all ranks in nats per token."""
        config, finite = self._config, math.isfinite(loss)
        self.skipped_in_a_row = 0 if finite and step_taken else self.skipped_in_a_row + 1
        is_full = len(self._window) == config.loss_spike_window
        norm = statistics.median(self._window) if is_full else math.inf
        threshold = config.loss_spike_threshold
        spike = finite and threshold is not None and loss > norm + threshold
        if finite:
            self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if finite and not spike:
            self._window.append(loss)
        if self.skipped_in_a_row >= config.max_skipped_steps:
            return Verdict(
                spike,
                f"guard.max_skipped_steps={config.max_skipped_steps}",
                f"{self.skipped_in_a_row} step(s) in a row had a non-finite loss or gradient, the "
                f"last was step {iteration}",
            )
        if spike and self.spikes_in_a_row >= config.max_spikes:
            return Verdict(
                spike,
                f"guard.max_spikes={config.max_spikes}",
                f"{self.spikes_in_a_row} loss spike(s) in a row, the last at step {iteration}: "
                f"{loss:.4f} is more than {config.loss_spike_threshold} above the median "
                f"{norm:.4f} of the last {config.loss_spike_window} good losses",
            )
        return Verdict(spike)

    @property
    def in_trouble(self) -> bool:
        """Whether the last step was bad: a checkpoint of now would be a bad place to return to."""
        return self.skipped_in_a_row > 0 or self.spikes_in_a_row > 0

    def begin_rollback(self, verdict: Verdict) -> None:
        """Count a rollback, to be done with `rewind`; raise TrainingError to stop the run."""
        config = self._config
        if config.action == "stop":
            raise TrainingError(
                f"{verdict.limit}: {verdict.reason}. Lower optimizer.lr, resume "
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
        """Take the window of a checkpoint's `state`; rows start anew, rollbacks stay counted."""
        self._window = deque(state["window"], maxlen=self._config.loss_spike_window)
        self.skipped_in_a_row = self.spikes_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as JSON."""
        return {"window": list(self._window)} | {name: getattr(self, name) for name in _COUNTERS}

    @classmethod
    def from_state(cls, config: GuardConfig, state: dict[str, Any]) -> LossGuard:
        """Return a guard that continues from a `state`; a smaller window keeps the newest."""
        guard = cls(config)
        guard.rewind(state)
        for name in _COUNTERS:
            setattr(guard, name, state[name])
        return guard
