"""Files and folders that are complete or absent: written beside, flushed, renamed; their hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from megatron_bitcpm.errors import BitcpmError, CheckpointError

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


def sync(path: Path) -> None:
    """Flush one file's data, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        CheckpointError: absent, unreadable or no JSON object; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("holds no JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"file={path}: {' '.join(reason.split()).rstrip('.')}. Restore it, or name another "
            "folder."
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a text file: the old or the new content is there, never a part."""
    scratch = path.with_name(f".tmp-{path.name}")
    try:
        scratch.write_text(text, encoding="utf-8")
        sync(scratch)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish_folder(scratch: Path, target: Path) -> None:
    """Give a finished folder its name; what was there before goes only then.

    Args:
        scratch: the folder, complete, beside `target`.
        target: its final place; if it exists it is replaced.

    Raises:
        OSError: the target is as it was.
    """
    sync_tree(scratch)
    old = scratch.with_name(f".old{scratch.name}")
    try:
        if target.exists():
            if old.exists():  # left by a crash, after which the target came into being anew
                shutil.rmtree(old)
            os.rename(target, old)
        os.rename(scratch, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def hash_files(folder: Path, names: Sequence[str]) -> str:
    """Return the sha256 over names and bytes of those files that a folder has."""
    digest = hashlib.sha256()
    for name in sorted(names):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def lock_folder(folder: Path) -> IO[str] | None:
    """Take the lock of a folder, which ends with the process or when the result is closed.

    Returns:
        The open lock file; None where the file system has no locks.

    Raises:
        BitcpmError: another process holds it.
    """
    stream = (folder / ".lock").open("a", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise BitcpmError(
            f"checkpoint.directory={folder}: another run is writing there. Wait for its end, stop "
            "it, or name another folder."
        ) from error
    except OSError:
        stream.close()
        return None
    return stream
