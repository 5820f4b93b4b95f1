"""`bitcpm generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate_command(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0 among all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modelling code of others.")
    ] = False,
) -> None:
    """Continue a text with transformers."""
    from megatron_bitcpm.evaluation.generate import generate

    typer.echo(generate(model, prompt, max_new_tokens, temperature, top_k, seed, trust_remote_code))
