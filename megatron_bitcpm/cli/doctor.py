"""`bitcpm doctor`."""

from __future__ import annotations

import typer

from megatron_bitcpm.cli.output import AsJson


def doctor_command(as_json: AsJson = False) -> None:
    """Check what is installed and whether it works; name the fix of each problem."""
    from megatron_bitcpm.doctor import diagnose, exit_code, render_json, render_table

    findings = diagnose()
    typer.echo(render_json(findings) if as_json else render_table(findings))
    raise typer.Exit(exit_code(findings))
