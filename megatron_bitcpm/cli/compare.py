"""`bitcpm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bitcpm.cli.output import print_json


def compare_command(
    runs: Annotated[list[str], typer.Argument(help="LABEL=RUN_FOLDER, one or more.")],
    plot: Annotated[Path | None, typer.Option(help="PNG file of the losses.")] = None,
) -> None:
    """Compare finished runs on their validation split, with a bigram model as the floor."""
    from megatron_bitcpm.evaluation.compare import compare_runs

    print_json(compare_runs(runs, plot))
