"""JSON files, and the files of a tokenizer with their hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_bitcpm.errors import CheckpointError, one_line

# In the order of their hash.
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What decides the ids of a Hugging Face tokenizer; a folder need not have all."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; CheckpointError names a file without one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("holds no JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise CheckpointError(
            f"file={path}: {reason}. Restore it, or name another folder."
        ) from error


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Write a JSON file for people to read too."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def tokenizer_sha256(folder: str | Path) -> str:
    """Return the sha256 over names and bytes of `TOKENIZER_FILES`; no other files count."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = Path(folder) / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
