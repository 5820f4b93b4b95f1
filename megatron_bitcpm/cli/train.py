"""`bitcpm train`, and the schema of its YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bitcpm.cli.output import print_json


def train_command(
    config: Annotated[Path, typer.Option(help="YAML file of the run, see launch/configs.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from checkpoint.directory.")
    ] = False,
) -> None:
    """Train a model; start it under torchrun for more than one rank."""
    from megatron_bitcpm.config import env_world_size, load_config
    from megatron_bitcpm.training.trainer import train

    train(load_config(config, set_, env_world_size()), resume)


def config_schema_command() -> None:
    """Print the JSON schema of the YAML file, for editors."""
    from megatron_bitcpm.config import RunConfig

    print_json(RunConfig.model_json_schema())
