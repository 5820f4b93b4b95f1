"""Progress of `prepare`: a live bar on a terminal, otherwise a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from megatron_bitcpm.data.text import ReadReport

if TYPE_CHECKING:
    from rich.progress import Progress

_PLAIN_INTERVAL_S = 5.0
_LIVE_INTERVAL_S = 0.1
_BAR_COLUMNS = 10


class PrepareProgress:
    """Lines, MB and tokens per second, written to standard error.

    Args:
        total_bytes: size of all input files.
        enabled: False writes nothing.
    """

    def __init__(self, total_bytes: int, enabled: bool = True) -> None:
        self._total = max(1, total_bytes)
        self._enabled = enabled
        self._bar: Progress | None = None
        self._latest: tuple[ReadReport, int] | None = None

    def __enter__(self) -> PrepareProgress:
        self._start = self._last = time.monotonic()
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("prepare"),
                BarColumn(bar_width=_BAR_COLUMNS),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            # what is beside the text: "prepare", the bar, the time left, and blanks
            self._columns = self._bar.console.width - len("prepare") - _BAR_COLUMNS - 7 - 3
            self._task = self._bar.add_task("starting", total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._latest is not None:
            self._write(*self._latest)
        if self._bar is not None:
            self._bar.stop()

    def update(self, report: ReadReport, tokens: int) -> None:
        """Show the counters now, if the last time is long enough ago."""
        if not self._enabled:
            return
        self._latest = (report, tokens)
        interval = _PLAIN_INTERVAL_S if self._bar is None else _LIVE_INTERVAL_S
        if time.monotonic() - self._last >= interval:
            self._write(report, tokens)

    def _write(self, report: ReadReport, tokens: int) -> None:
        self._last = time.monotonic()
        rate = tokens / max(1e-9, self._last - self._start)
        # the most important last; a narrow terminal leaves out the first
        parts = [
            f"{report.lines:,} lines",
            f"{report.documents:,} documents",
            f"{tokens:,} tokens",
            f"{report.bytes_read / 1e6:,.1f} of {self._total / 1e6:,.1f} MB",
            f"{rate:,.0f} tokens/s",
        ]
        if self._bar is None:
            print(f"prepare: {'  '.join(parts)}", file=sys.stderr, flush=True)
            return
        while len(parts) > 1 and len("  ".join(parts)) > self._columns:
            parts.pop(0)
        self._bar.update(self._task, completed=report.bytes_read, description="  ".join(parts))
