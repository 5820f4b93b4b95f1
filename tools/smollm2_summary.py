"""The end of `launch/smollm2.sh`: what was compared, and what differed, in one table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MODELS = {"g64": "64 inputs", "row": "row"}


def read(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def list_rows(folder: Path) -> list[tuple[str, int, int]]:
    """Return (what, how many were compared, how many differ)."""
    ways = read(folder / "matrix.json")
    rows = [
        (
            "ways through Megatron and back",
            len(ways),
            sum(bool(w["values"] or w["codes"] or w["files"]) for w in ways),
        ),
        ("tensors on these ways", sum(w["tensors"] for w in ways), sum(w["values"] for w in ways)),
    ]
    tokens = read(folder / "hf-tokens.json")
    rows.append(
        (
            "greedy tokens beside Megatron's, before the training",
            tokens["tokens"],
            tokens["tokens"] - sum(tokens["equal"].values()),
        )
    )
    for model, scale in MODELS.items():
        pairs, tokens = read(folder / f"{model}-pairs.json"), read(folder / f"{model}-tokens.json")
        rows.append(
            (
                f"one scale for each {scale}: pairs of formats",
                len(pairs),
                sum(pair["verdict"] != "equal" for pair in pairs),
            )
        )
        rows.append(
            (
                f"one scale for each {scale}: tensors, by codes",
                sum(pair["compared_tensors"] for pair in pairs),
                sum(pair["differing_codes"] for pair in pairs),
            )
        )
        decoded = tokens["tokens"] * len(tokens["equal"])
        rows.append(
            (
                f"one scale for each {scale}: greedy tokens beside Megatron's",
                decoded,
                decoded - sum(tokens["equal"].values()),
            )
        )
    return rows


def main() -> int:
    """Print the table of a finished `launch/smollm2.sh`; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="OUT of launch/smollm2.sh")
    rows = list_rows(parser.parse_args().folder)
    print("| SmolLM2-135M-Instruct | compared | differ |\n|---|---|---|")
    for what, compared, differ in rows:
        print(f"| {what} | {compared:,} | {differ:,} |")
    return int(any(differ for _, _, differ in rows))


if __name__ == "__main__":
    sys.exit(main())
