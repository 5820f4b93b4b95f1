"""The progress bar of conversions: bytes done and MB/s, on standard error, only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping


def track_tensors(sizes: Mapping[str, int], label: str) -> Iterator[str]:
    """Yield the names, and show how many bytes of them the caller is done with.

    Args:
        sizes: tensor -> bytes, in the order of the work.
        label: one word in front of the bar, for example ``write``.
    """
    if not sys.stderr.isatty():
        yield from sizes
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn(label),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=sum(sizes.values()))
        for name, size in sizes.items():
            yield name
            bar.advance(task, size)
