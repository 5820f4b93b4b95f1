"""The `bitcpm` command: one module a verb or family, each options and one call.

A wrong input prints one line and exits with code 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import warnings
from typing import Annotated

import typer

from megatron_bitcpm.cli import bench, convert, data, doctor, models, train
from megatron_bitcpm.errors import BitcpmError, ConfigError
from megatron_bitcpm.version import __version__

app = typer.Typer(
    help="Pretrain ternary (1.58-bit) language models with Megatron, convert and verify them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train_command)
app.command("convert")(convert.convert_command)
app.command("verify")(models.verify_command)
app.command("inspect")(models.inspect_command)
app.command("generate")(models.generate_command)
app.command("compare")(models.compare_command)
app.command("doctor")(doctor.doctor_command)
app.command("config-schema")(train.config_schema_command)
app.add_typer(data.data_app, name="data")
app.add_typer(bench.bench_app, name="bench")


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `bitcpm` command."""
    from megatron_bitcpm.config import env_rank, env_world_size

    rank, world_size = env_rank(), env_world_size()
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        # A crash in compiled code says where in Python it was.
        faulthandler.enable(sys.__stderr__)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", force=True
    )
    # Notes about absent accelerator libraries and names soon to be renamed: nothing that a user can
    # act on, and many of them on every rank.
    for category in (UserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\b")
    # Megatron logs its configuration objects at this level.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    try:
        app(arguments)
    except BitcpmError as error:
        lines = error.problems if isinstance(error, ConfigError) else [str(error)]
        prefix = f"[rank {rank}] " if world_size > 1 else ""
        # One write, so that the lines of several ranks do not run together.
        sys.stderr.write("".join(f"{prefix}bitcpm: {line}\n" for line in lines))
        sys.stderr.flush()
        sys.exit(2)
