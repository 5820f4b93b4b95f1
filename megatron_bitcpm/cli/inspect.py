"""`bitcpm inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bitcpm.cli.output import print_json


def inspect_command(
    path: Annotated[Path, typer.Argument(help="Model folder, checkpoint, run, or weights file.")],
    fix_config: Annotated[
        bool,
        typer.Option("--fix-config", help="Correct config.json; keeps the old as config.json.bak."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder, where the model has none.")
    ] = None,
) -> None:
    """Say what a model is: architecture, contradictions, quantiser, grid, memory."""
    from megatron_bitcpm.conversion.inspect import inspect
    from megatron_bitcpm.conversion.inspect_text import render

    report = inspect(path, fix_config=fix_config, tokenizer=tokenizer)
    if as_json:
        print_json(report)
    else:
        typer.echo(render(report))
