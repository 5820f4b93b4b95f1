"""Progress of long work on standard error: a live bar on a terminal, elsewhere lines or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as _Bar

_PLAIN_INTERVAL_S = 5.0
_LIVE_INTERVAL_S = 0.1
_BAR_WIDTH = 40
_BAR_WIDTH_BESIDE_TEXT = 10


class Progress:
    """How much of a piece of work is done: label, bar, what the caller adds, time left.

    Args:
        columns: behind the bar, as for `rich.progress.Progress`.
        completed: of `total`, done before.
        text: instead of columns: called with the seconds since the start, returns parts of a line,
            the most important last; a narrow terminal leaves out the first. Without a terminal the
            whole line is printed every few seconds.
    """

    def __init__(
        self,
        label: str,
        total: float,
        *columns: str | ProgressColumn,
        completed: int = 0,
        text: Callable[[float], list[str]] | None = None,
        enabled: bool = True,
    ) -> None:
        self._live = enabled and sys.stderr.isatty()
        self._shown = self._live or (enabled and text is not None)
        self._label, self._text = label, text
        self._completed: float | None = None
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        width = _BAR_WIDTH if text is None else _BAR_WIDTH_BESIDE_TEXT
        # What is beside the text: the label, the bar, the time left, and blanks.
        self._text_width = self._console.width - len(label) - width - 7 - 3
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(width),
            *(columns if text is None else (TextColumn("{task.fields[text]}"),)),
            TimeRemainingColumn(),
            console=self._console,
            transient=text is None,
            disable=not self._live,
        )
        self._task = self._bar.add_task(label, total=total, completed=completed, text="starting")

    def start(self) -> Progress:
        """Show the bar, and start the clock; so does a ``with`` block."""
        self._start = self._last = time.monotonic()
        self._bar.start()
        return self

    def stop(self) -> None:
        """Show what is done in the end, and leave the terminal as it was."""
        if self._completed is not None:
            self._show(self._completed)
        if self._live:
            self._bar.stop()

    __enter__ = start

    def __exit__(self, *error: object) -> None:
        self.stop()

    def update(self, completed: float) -> None:
        """Take note of how much is done; a text follows when the last one is old enough."""
        if self._shown:
            self._completed = completed
            interval_s = _LIVE_INTERVAL_S if self._live else _PLAIN_INTERVAL_S
            if self._text is None or time.monotonic() - self._last >= interval_s:
                self._show(completed)

    def say(self, text: str) -> None:
        """Print text above the bar."""
        self._console.print(text, markup=False)

    def _show(self, completed: float) -> None:
        self._last = time.monotonic()
        parts = [] if self._text is None else self._text(max(1e-9, self._last - self._start))
        if not self._live:
            print(f"{self._label}: {'  '.join(parts)}", file=sys.stderr, flush=True)
            return
        while len(parts) > 1 and len("  ".join(parts)) > self._text_width:
            parts.pop(0)
        self._bar.update(self._task, completed=completed, text="  ".join(parts))


def track_tensors(sizes: Mapping[str, int], label: str) -> Iterator[str]:
    """Yield the names of `sizes`, name -> bytes, and show how many bytes the caller has done."""
    total, done = sum(sizes.values()), 0
    with Progress(label, total, DownloadColumn(), TransferSpeedColumn()) as progress:
        for name, size in sizes.items():
            yield name
            done += size
            progress.update(done)
