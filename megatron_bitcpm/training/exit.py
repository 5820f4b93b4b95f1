"""Ending a run early in good order: by a signal or after a time.

After each step all ranks agree on whether to stop: a cluster may signal one process only, and the
clocks of machines differ.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ExitRequest:
    """Watches for reasons to stop; a context manager that holds the signal handlers."""

    def __init__(self, duration_min: float | None, device: torch.device) -> None:
        self._deadline_s = None if duration_min is None else time.monotonic() + 60 * duration_min
        self._device = device
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> ExitRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def reason(self) -> str | None:
        """Return why to stop now, the same on all ranks, or None; collective over all ranks."""
        overdue = self._deadline_s is not None and time.monotonic() >= self._deadline_s
        mine = torch.tensor([self._signal, int(overdue)], device=self._device)
        torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
        number, overdue_somewhere = mine.tolist()
        if number:
            return signal.Signals(number).name
        return "training.exit_duration_in_mins" if overdue_somewhere else None
