"""`bitcpm verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bitcpm.cli.output import print_json


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
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modelling code of others.")
    ] = False,
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
