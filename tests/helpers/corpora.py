"""A tokenizer and a dataset of a small text."""

from __future__ import annotations

from pathlib import Path


def prepare_corpus(
    text: Path, tokenizer: Path, prefix: Path, valid_fraction: float, document_chars: int
) -> None:
    """Train a tokenizer of 300 ids on a file, and prepare the file with it."""
    from megatron_bitcpm.data.prepare import prepare
    from megatron_bitcpm.data.tokenizer_train import train_tokenizer

    train_tokenizer([text], tokenizer, vocab_size=300)
    prepare(
        [text],
        tokenizer,
        prefix,
        valid_fraction=valid_fraction,
        document_chars=document_chars,
        show_progress=False,
    )
