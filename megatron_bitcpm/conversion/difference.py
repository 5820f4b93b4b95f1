"""What two models do not share, counted by tensor and by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_bitcpm.arch.tensors import Shape, find_tensor

KINDS = ("codes", "scales", "values")
_LISTED = 5
"""Tensors that a line names; the table has all."""


@dataclass
class Differences:
    """Counts of what differs, by kind and tensor, of those that were compared.

    Kinds are codes: weights that have another code on the grid; scales: groups that have another
    one; values: latents, and weights in full precision, that are not equal bit for bit.
    """

    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {kind: Counter() for kind in KINDS}
    )
    compared: list[str] = field(default_factory=list)

    def note(self, name: str, **counts: int) -> None:
        """Add counts of a tensor by kind; zeros are left out."""
        for kind, count in counts.items():
            if count:
                self.counts[kind][name] = count

    def describe(self) -> list[str]:
        """Return for each kind that differs its count and the first tensors."""
        parts = []
        for kind, counts in self.counts.items():
            if counts:
                names = [f"{name} ({count})" for name, count in counts.items()]
                parts.append(f"{counts.total()} {kind} differ: {list_first(names, 'tensors')}")
        return parts

    def by_layer(self) -> list[dict[str, Any]]:
        """Return the counts of each layer, then those of what is in no layer (layer None)."""
        rows: dict[int | None, dict[str, Any]] = {}
        for name in self.compared:
            place = find_tensor(name)
            layer = None if place is None else place.layer
            row = rows.setdefault(layer, {"layer": layer, "tensors": 0, **dict.fromkeys(KINDS, 0)})
            row["tensors"] += 1
            for kind, counts in self.counts.items():
                row[kind] += counts[name]
        numbers = sorted(layer for layer in rows if layer is not None)
        return [rows[layer] for layer in (*numbers, *([None] if None in rows else []))]


def list_first(names: Iterable[str], what: str) -> str:
    """Join the first names; say how many more of `what` there are."""
    # A name out of a file may hold anything; line ends and escape codes are not printed as such.
    names = [name if name.isprintable() else repr(name) for name in names]
    more = f" and {len(names) - _LISTED} more {what}" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def markdown_table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table; bars and line ends inside cells are escaped."""

    def line(cells: Iterable[Any]) -> str:
        escaped = (str(c).replace("|", "\\|").replace("\n", "\\n") for c in cells)
        return f"| {' | '.join(escaped)} |"

    header = list(header)
    return "\n".join([line(header), line("---" for _ in header), *map(line, rows)]) + "\n"


@dataclass(frozen=True)
class Misfits:
    """How the tensors of a model are not those of its architecture.

    `misshapen` says of a tensor what its shape is, and what it should be.
    """

    missing: list[str]
    unknown: list[str]
    misshapen: dict[str, str]

    def names(self) -> list[str]:
        """Return all names, in the order in which they are described."""
        return [*self.missing, *self.unknown, *self.misshapen]

    def describe(self) -> str:
        """Return one clause for each kind, '' where everything fits."""
        misshapen = [f"{name} is {text}" for name, text in self.misshapen.items()]
        clauses = [
            f"{len(names)} {what} tensors: {list_first(names, 'tensors')}"
            for names, what in (
                (self.missing, "missing"),
                (self.unknown, "unknown"),
                (misshapen, "misshapen"),
            )
            if names
        ]
        return "; ".join(clauses)


def compare_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Misfits:
    """Compare the tensors of a model, name -> shape, with those that its architecture has."""
    return Misfits(
        [name for name in wanted if name not in found],
        [name for name in found if name not in wanted],
        {
            name: f"{list(found[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != shape
        },
    )
