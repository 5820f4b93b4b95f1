"""The `bitcpm` command: argument parsing and one call for each verb.

A wrong input prints one line and exits with code 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_bitcpm.errors import BitcpmError, ConfigError
from megatron_bitcpm.version import __version__

app = typer.Typer(
    help="Pretrain ternary (1.58-bit) language models with Megatron, convert and verify them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Tokenizers and datasets.", no_args_is_help=True)
export_app = typer.Typer(help="Write checkpoints in other formats.", no_args_is_help=True)
bench_app = typer.Typer(help="Measurements, printed as JSON.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(export_app, name="export")
app.add_typer(bench_app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megatron_bitcpm {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    del version


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run, see launch/configs.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from checkpoint.directory.")
    ] = False,
) -> None:
    """Train a model; start it under torchrun for more than one rank."""
    from megatron_bitcpm.config import load_config
    from megatron_bitcpm.training.runtime import env_world_size
    from megatron_bitcpm.training.trainer import train as run

    run(load_config(config, set_, env_world_size()), resume)


@app.command("config-schema")
def config_schema() -> None:
    """Print the JSON schema of the YAML file, for editors."""
    from megatron_bitcpm.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `bitcpm` command."""
    from megatron_bitcpm.training.runtime import env_rank, env_world_size

    rank, world_size = env_rank(), env_world_size()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", force=True
    )
    # Megatron logs its configuration objects at this level.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        app(arguments)
    except BitcpmError as error:
        lines = error.problems if isinstance(error, ConfigError) else [str(error)]
        prefix = f"[rank {rank}] " if world_size > 1 else ""
        for line in lines:
            print(f"{prefix}bitcpm: {line}", file=sys.stderr)
        sys.exit(2)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
