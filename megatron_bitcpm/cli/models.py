"""`bitcpm inspect`, `verify`, `generate` and `compare`: what models are, predict and reach."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bitcpm.cli.output import AsJson, print_json

_TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that came with the folder.")
]


def inspect_command(
    path: Annotated[Path, typer.Argument(help="Model folder, checkpoint, run, or weights file.")],
    fix_config: Annotated[
        bool,
        typer.Option("--fix-config", help="Correct config.json; keeps the old as config.json.bak."),
    ] = False,
    as_json: AsJson = False,
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


def verify_command(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, checkpoint, or run.")],
    other: Annotated[
        Path | None, typer.Argument(help="The model that it must equal, in any format and form.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder, where the models have none.")
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one a line, or .jsonl: compare the next token's probabilities."
        ),
    ] = None,
    logits_key: Annotated[
        str | None, typer.Option(help="Key of the prompt in a .jsonl file; default prompt.")
    ] = None,
    logits_dtype: Annotated[
        str | None,
        typer.Option(help="OTHER computes in float32 (default), or auto: the type of its files."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables to this .md file, not to the terminal.")
    ] = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Prove that every group lies on its grid and, with OTHER, that both are the same model.

    Without OTHER a changed sign, norm or embedding cannot be noticed. The exit code is 2 where
    anything differs; with --logits the table of predictions comes first.
    """
    from megatron_bitcpm.evaluation.verification import verify_models

    report, tables, content = verify_models(
        model, other, tokenizer, logits, logits_key, logits_dtype, markdown, trust_remote_code
    )
    if tables is not None:
        typer.echo(tables, err=True)
    if content is not None:
        print_json(content)
    report.proof()


def generate_command(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens; 0: among all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Continue a text with transformers."""
    from megatron_bitcpm.evaluation.generate import generate

    typer.echo(generate(model, prompt, max_new_tokens, temperature, top_k, seed, trust_remote_code))


def compare_command(
    runs: Annotated[list[str], typer.Argument(help="LABEL=RUN_FOLDER, one or more.")],
    plot: Annotated[Path | None, typer.Option(help="PNG file of the losses.")] = None,
) -> None:
    """Compare finished runs on their validation split, with a bigram model as the floor."""
    from megatron_bitcpm.evaluation.compare import compare_runs

    print_json(compare_runs(runs, plot))
