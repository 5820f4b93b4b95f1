"""Interleaved measurements: every one is taken once a round, so that a drift slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def time_s(call: Callable[[], Any], calls: int = 1) -> float:
    """Return the seconds that a call takes, the mean of several."""
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    elapsed_s = time.perf_counter() - start
    del result  # freed outside the timing, before the next call allocates
    return elapsed_s / calls


def interleave(
    measures: Mapping[K, Callable[[], T]], rounds: int, alternate: bool = False
) -> dict[K, list[T]]:
    """Take every measurement once a round, after a first round that does not count.

    With `alternate` every second round goes backwards, so that a steady drift cancels.
    """
    found: dict[K, list[T]] = {name: [] for name in measures}
    for index in range(-1, rounds):
        for name in list(measures)[:: -1 if alternate and index % 2 else 1]:
            value = measures[name]()
            if index >= 0:
                found[name].append(value)
    return found


def time_interleaved(
    candidates: Mapping[K, Callable[[], Any]], rounds: int
) -> dict[K, list[float]]:
    """Return the seconds of every candidate, by name and round."""
    return interleave({name: partial(time_s, call) for name, call in candidates.items()}, rounds)


def medians(found: Mapping[K, Sequence[float]]) -> dict[K, float]:
    """Return the median of the rounds, by name."""
    return {name: statistics.median(values) for name, values in found.items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the rounds' ratios, of the rounds that both have."""
    return [a / b for a, b in zip(above, below, strict=False)]
