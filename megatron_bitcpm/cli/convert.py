"""`bitcpm convert` and `bitcpm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bitcpm.cli.output import print_report

export_app = typer.Typer(help="Write checkpoints in other formats.", no_args_is_help=True)


def convert_command(
    # Paths as they were typed: to `Path` the empty one is the working folder.
    input_: Annotated[
        str,
        typer.Option(
            "--input", metavar="PATH", help="Hugging Face folder, Megatron checkpoint, or run."
        ),
    ],
    output: Annotated[str, typer.Option(metavar="PATH", help="Folder to write.")],
    to: Annotated[str, typer.Option(help="torch_dist, legacy, plain, latent or pseudo.")],
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="Megatron: shards of each layer; default 1.")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="Megatron: pipeline stages; default 1.")
    ] = None,
    virtual_pipeline_parallel_size: Annotated[
        int | None, typer.Option(help="Megatron: chunks on each stage (interleaved).")
    ] = None,
    transformer_impl: Annotated[
        str | None,
        typer.Option(help="Legacy shards: names of local (default) or transformer_engine layers."),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(help="Of a MiniCPM: minicpm (default) or llama, which folds its constants."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Tokenizer folder, where the input has none."),
    ] = None,
    quant_type: Annotated[
        str | None, typer.Option(help="Grid that trained unstamped latents, for example ternary.")
    ] = None,
    group_size: Annotated[
        str | None, typer.Option(help="... its inputs per scale; -1 is the row, or tensor.")
    ] = None,
    eps: Annotated[float | None, typer.Option(help="... its smallest scale; default 1e-5.")] = None,
    numerics: Annotated[
        str | None, typer.Option(help="... its arithmetic: fp32 (default) or bf16_reciprocal.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Hugging Face: largest weights file; default 5GB.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Hugging Face: safetensors (default) or bin.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with latents that look untrained.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, if it is a model.")
    ] = False,
) -> None:
    """Convert between Megatron and Hugging Face, and prove that nothing changed."""
    from megatron_bitcpm.conversion.convert import convert

    print_report(
        convert(
            input_,
            output,
            to,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            virtual_pipeline_parallel_size=virtual_pipeline_parallel_size,
            transformer_impl=transformer_impl,
            architecture=architecture,
            tokenizer=tokenizer,
            quant_type=quant_type,
            group_size=group_size,
            eps=eps,
            numerics=numerics,
            max_shard_size=max_shard_size,
            weights=weights,
            force=force,
            overwrite=overwrite,
        )
    )


@export_app.command("hf")
def export_hf_command(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or a run (its newest one).")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder; default the run's own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Write a pseudo-quantised Hugging Face folder that any Llama runtime loads."""
    from megatron_bitcpm.conversion.hf.writer import export_hf

    print_report(export_hf(checkpoint, output, tokenizer=tokenizer, overwrite=overwrite))
