"""The order in which the samples of several sets follow each other.

After t samples each set has given what Webster's apportionment (Sainte-Lague) allots it of t seats:
sample j of a set with weight w stands at (2j + 1) / w, the earlier set first on a tie. So sample t
follows from t and the weights alone, without a total, a state or random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_BLOCK = 1 << 12
_LARGEST_SHARE = 1 << 53
"""Integers up to this are exact in float64, in which (2j + 1) / w is compared."""


def blend_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return positive weights as integers without a common factor: 0.3, 0.9 gives 1, 3.

    Weights count as the decimal numbers they are written as; shares beyond 2**53 are rounded.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(value.denominator for value in exact))
    shares = [int(value * scale) for value in exact]
    top = max(shares) // math.gcd(*shares)
    if top > _LARGEST_SHARE:
        shares = [max(1, share * _LARGEST_SHARE // max(shares)) for share in shares]
    divisor = math.gcd(*shares)
    return tuple(share // divisor for share in shares)


class Blend:
    """Which set, and which sample of it, each sample is; `weights` are positive, in any unit."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = blend_shares(weights)
        self._block = -1
        self._sets = self._samples = np.empty(0, np.int64)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (set, number of the sample among those of that set), both from 0."""
        if len(self.shares) == 1:
            return 0, index
        block, offset = divmod(index, _BLOCK)
        if block != self._block:
            first, sets, samples = self._merge(block * _BLOCK, _BLOCK)
            skip = block * _BLOCK - sum(first)
            self._sets = sets[skip : skip + _BLOCK]
            self._samples = samples[skip : skip + _BLOCK]
            self._block = block
        return int(self._sets[offset]), int(self._samples[offset])

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first num_samples samples each set gives."""
        first, sets, _ = self._merge(num_samples, 0)
        before = sets[: num_samples - sum(first)]
        return [n + int((before == k).sum()) for k, n in enumerate(first)]

    def _merge(self, start: int, size: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Merge the sets around positions [start, start + size): first, sets, samples.

        `first` counts the samples of each set left out before `start`; the others, [n] int64, are
        the merged order from position sum(first) on, up to start + size at least.
        """
        # Up to a position (2j + 1) / w = x there are x * total / 2 samples, give or take half a
        # sample for each set, so a margin of a few samples a set holds all that can matter.
        total, margin = sum(self.shares), len(self.shares)
        first = [max(0, share * (start - margin) // total - 1) for share in self.shares]
        last = [share * (start + size + margin) // total + 2 for share in self.shares]
        samples = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        lengths = [b - a for a, b in zip(first, last, strict=True)]
        sets = np.repeat(np.arange(len(first)), lengths)
        place = (2 * samples + 1) / np.array(self.shares, np.float64)[sets]
        order = np.lexsort((sets, place))
        return first, sets[order], samples[order]
