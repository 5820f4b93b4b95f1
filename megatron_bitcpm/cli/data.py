"""`bitcpm data`: tokenizers and datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bitcpm.cli.output import print_json

data_app = typer.Typer(help="Tokenizers and datasets.", no_args_is_help=True)

_Input = Annotated[
    list[str],
    typer.Option("--input", help="File or folder of text or JSONL, or stdlib: ; repeatable."),
]
_JsonlKey = Annotated[str, typer.Option(help="Key of the text in JSONL lines.")]
_MaxBadLines = Annotated[int, typer.Option(help="Stop after this many bad lines.")]


@data_app.command("tokenizer")
def tokenizer_command(
    input_: _Input,
    output: Annotated[Path, typer.Option(help="Folder of the new tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Number of token ids.")] = 4096,
    sample_mb: Annotated[float, typer.Option(help="Most text to learn from, in MB.")] = 32.0,
    jsonl_key: _JsonlKey = "text",
    max_bad_lines: _MaxBadLines = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Train a SentencePiece tokenizer; AutoTokenizer loads the folder."""
    from megatron_bitcpm.data.tokenizer_train import train_tokenizer

    report = train_tokenizer(
        input_,
        output,
        vocab_size=vocab_size,
        sample_mb=sample_mb,
        jsonl_key=jsonl_key,
        max_bad_lines=max_bad_lines,
        overwrite=overwrite,
    )
    print_json(report)


@data_app.command("prepare")
def prepare_command(
    input_: _Input,
    tokenizer: Annotated[Path, typer.Option(help="Any Hugging Face tokenizer folder.")],
    output_prefix: Annotated[Path, typer.Option(help="Prefix of the dataset files.")],
    valid_fraction: Annotated[
        float, typer.Option(help="Share of documents to validate on.")
    ] = 0.03,
    jsonl_key: _JsonlKey = "text",
    document_chars: Annotated[
        int, typer.Option(help="Text files are cut into documents of at most this many characters.")
    ] = 4096,
    max_bad_lines: _MaxBadLines = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files.")] = False,
) -> None:
    """Turn text into Megatron datasets, one to train and one to validate on."""
    from megatron_bitcpm.data.prepare import prepare

    report = prepare(
        input_,
        tokenizer,
        output_prefix,
        valid_fraction=valid_fraction,
        jsonl_key=jsonl_key,
        document_chars=document_chars,
        max_bad_lines=max_bad_lines,
        overwrite=overwrite,
    )
    print_json(report)
