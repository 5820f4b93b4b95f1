"""Compare every two of several models, of any formats, and print the counts as Markdown.

Exits with 1 if any two differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.verify import compare

COUNTS = ("compared_tensors", "differing_codes", "differing_scales", "differing_values")


def main() -> int:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="folders and checkpoints, two or more")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if len(arguments.models) < 2:
        parser.error("name two models or more")
    rows: list[dict[str, Any]] = []
    failed = False
    print("| first | second | tensors | codes that differ | scales | other values | verdict |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for first, second in itertools.combinations(arguments.models, 2):
        a, b = open_source(first), open_source(second)
        report = compare(b, a)
        failed |= bool(report.problems)
        counts = [report.content.get(key) for key in COUNTS]
        verdict = "; ".join(report.problems) or "equal"
        names = [f"{path.name} ({s.kind}, {s.form})" for path, s in ((first, a), (second, b))]
        print(f"| {' | '.join(str(cell) for cell in [*names, *counts, verdict])} |", flush=True)
        row = dict(zip(COUNTS, counts, strict=True))
        rows.append({"first": first.name, "second": second.name, **row, "verdict": verdict})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
