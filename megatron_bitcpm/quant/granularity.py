"""How many weights share a scale, as configured: a group of inputs, a row, or a projection."""

from __future__ import annotations

import contextlib

WHOLE_ROW = -1
TENSOR = "tensor"
"""One scale for a whole Hugging Face projection."""


def parse_group_size(value: object) -> int | str:
    """Return a configured group size: inputs per scale, -1 for the whole row, or ``tensor``.

    Raises:
        ValueError: it is none of these; says what it must be.
    """
    if value == TENSOR:
        return TENSOR
    number = 0
    if isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            number = int(value)
    if number < 1 and number != WHOLE_ROW:
        raise ValueError("must be a whole number of at least 1, -1 for the whole row, or tensor")
    return number
