"""The grids of levels: which values a weight may take, in units of its group's scale.

    name        levels             scale s           stored codes
    ternary     -1 0 1             mean(|w|)         the level
    asym4       -2 -1 0 1          max(|w|) / 1.5    the level
    half_sym4   -1.5 -0.5 0.5 1.5  max(|w|) / 1.5    -3 -1 1 3, twice the level
    int_sym4    -2 -1 1 2          max(|w|) / 2      the level
    five        -2 -1 0 1 2        max(|w|) / 2      the level

A weight takes the nearest level of its own sign: its magnitude is compared with the midpoints of
neighbouring levels times s. On a midpoint the smaller magnitude wins; a zero of either sign takes
level 0 or, in a grid without 0, the smallest positive level.

Source: BitCPM-CANN technical report, section 3.1. `quant.scales` computes scales,
`quant.fake_quant` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from megatron_bitcpm.errors import BitcpmError


@dataclass(frozen=True)
class Grid:
    """The levels of a weight, and the statistic of a group's weights its scale comes from."""

    name: str
    codes: tuple[int, ...]  # int8 values that are stored, ascending
    code_unit: float  # level = code * code_unit
    statistic: Literal["abs_sum", "abs_max"]  # scale = sum / inputs, or maximum / divisor
    divisor: float

    @property
    def levels(self) -> tuple[float, ...]:
        """Values of a weight in units of its scale, ascending."""
        return tuple(code * self.code_unit for code in self.codes)

    @property
    def positive(self) -> tuple[int, ...]:
        """Codes of weights >= 0 by magnitude; the first is that of a zero weight."""
        return tuple(code for code in self.codes if code >= 0)

    @property
    def negative(self) -> tuple[int, ...]:
        """Codes of weights < 0 by magnitude, starting with 0 where the grid has it."""
        return tuple(code for code in reversed(self.codes) if code <= 0)

    @property
    def is_ternary(self) -> bool:
        """Whether the levels are -1, 0 and 1."""
        return self.codes == (-1, 0, 1)

    @property
    def code_bits(self) -> int:
        """Bits of a packed code."""
        return (len(self.codes) - 1).bit_length()

    @property
    def magnitudes(self) -> tuple[int, ...]:
        """Magnitudes of the codes besides 0, ascending: what a group can hold."""
        return tuple(sorted({abs(code) for code in self.codes if code}))

    def find_midpoints(self, side: tuple[int, ...]) -> tuple[float, ...]:
        """Magnitudes, in scales, above which the next code of a side is nearer; exact in float32.

        `side` is `positive` or `negative`.
        """
        return tuple((abs(a) + abs(b)) * self.code_unit / 2 for a, b in pairwise(side))


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("ternary", (-1, 0, 1), 1.0, "abs_sum", 1.0),
        Grid("asym4", (-2, -1, 0, 1), 1.0, "abs_max", 1.5),
        Grid("half_sym4", (-3, -1, 1, 3), 0.5, "abs_max", 1.5),
        Grid("int_sym4", (-2, -1, 1, 2), 1.0, "abs_max", 2.0),
        Grid("five", (-2, -1, 0, 1, 2), 1.0, "abs_max", 2.0),
    )
}
TERNARY = "ternary"


def find_grid(name: str) -> Grid:
    """Return the grid of this name; raises BitcpmError, naming the grids, where there is none."""
    if name not in GRIDS:
        raise BitcpmError(f"grid={name}: is not a grid. Use {', '.join(GRIDS)}.")
    return GRIDS[name]
