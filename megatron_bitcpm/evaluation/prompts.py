"""Prompts: read from a file, and turned into ids that two models share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.data.tokenizer_ids import has_vocabulary
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.evaluation.generate import load_hf_tokenizer


def read_prompts(path: str | Path, key: str | None = None) -> list[str]:
    """Read the lines of a UTF-8 file, of a ``.jsonl`` file the texts under `key` ("prompt").

    Empty lines are left out.
    """
    path = Path(path)
    if key is not None and path.suffix != ".jsonl":
        raise BitcpmError(
            f"logits-key={key}: has no effect on {path}, which is not a .jsonl file. Leave it out."
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise BitcpmError(f"logits={path}: {reason}. Name a text file of prompts.") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            line = _read_object(line, key or "prompt", f"{path} line {number}")
        prompts.append(line)
    if not prompts:
        raise BitcpmError(f"logits={path}: holds no prompts. Write one a line.")
    return prompts


def _read_object(line: str, key: str, where: str) -> str:
    try:
        value = json.loads(line)[key]
        if isinstance(value, str) and value:
            return value
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise BitcpmError(f"logits={where}: holds no text under {key}. Name another key.")


def tokenize_prompts(
    prompts: Sequence[str], sources: Sequence[ModelSource], tokenizer: str | Path | None
) -> tuple[list[list[int]], Callable[[int], str]]:
    """Return the ids of each prompt, and what turns an id into its text.

    The two models share a vocabulary; the tokenizer is by default the first one that they have.
    """
    if not prompts:
        raise BitcpmError("logits=[]: no prompts. Give at least one.")
    own = (source.side_files for source in sources)
    folder = tokenizer or next(filter(has_vocabulary, own), None)
    if folder is None:
        raise BitcpmError(
            f"tokenizer=None: neither {sources[0].path} nor {sources[1].path} has one. Name one "
            "(--tokenizer)."
        )
    loaded = load_hf_tokenizer(folder)
    longest = min(source.model.max_position_embeddings for source in sources)
    tokens = []
    for prompt in prompts:
        ids = list(loaded(prompt)["input_ids"])
        if not 1 <= len(ids) <= longest:
            raise BitcpmError(
                f"prompt={prompt[:40]!r}: has {len(ids)} tokens, the models take 1 to "
                f"{longest}. Change it."
            )
        if max(ids) >= sources[0].vocab_size:
            raise BitcpmError(
                f"tokenizer={folder}: has id {max(ids)}, the models {sources[0].vocab_size} ids. "
                "Name the tokenizer of the models (--tokenizer)."
            )
        tokens.append(ids)

    def word(index: int) -> str:
        return str(loaded.decode([index], clean_up_tokenization_spaces=False))

    return tokens, word
