"""How verbs print their reports, and the option that asks for JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2))


def print_report(report: dict[str, Any]) -> None:
    """Print a report whose warnings a user should see though standard output goes to a file."""
    for warning in report.get("warnings", ()):
        typer.echo(f"bitcpm: {warning}", err=True)
    print_json(report)
