"""`bitcpm bench`: measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bitcpm.cli.output import print_json

bench_app = typer.Typer(help="Measurements, printed as JSON.", no_args_is_help=True)


@bench_app.command("ops")
def ops_command(
    out_features: Annotated[int, typer.Option(help="Rows of the weight.")] = 4096,
    in_features: Annotated[int, typer.Option(help="Columns of the weight.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    group_size: Annotated[int, typer.Option(help="Inputs per scale; -1 is the row.")] = -1,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 31,
) -> None:
    """Time the CPU operators against memory and torch, interleaved in one process."""
    from megatron_bitcpm.bench.ops import bench_ops

    print_json(bench_ops(out_features, in_features, dtype, group_size, rounds))


@bench_app.command("train")
def train_command(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of steps.")] = 12,
) -> None:
    """Measure what ternary training costs beside full precision, on 0.5B layer shapes."""
    from megatron_bitcpm.bench.train import bench_train

    print_json(bench_train(pairs))


@bench_app.command("save")
def save_command(
    rounds: Annotated[int, typer.Option(help="Saves in each way.")] = 5,
) -> None:
    """Measure how long a checkpoint holds the training, written at once and in the background."""
    from megatron_bitcpm.bench.save import bench_save

    print_json(bench_save(rounds))


@bench_app.command("convert")
def convert_command(
    shape: Annotated[str, typer.Option(help="1B (3.2 GB), small or tiny.")] = "1B",
    rounds: Annotated[int, typer.Option(help="How often each conversion runs.")] = 1,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the input from the page cache each time.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where to work; about four times the model's size.")
    ] = None,
) -> None:
    """Time conversions of a synthetic model against dd, and measure their memory."""
    from megatron_bitcpm.bench.convert import bench_convert

    print_json(bench_convert(shape, rounds, cold, folder))
