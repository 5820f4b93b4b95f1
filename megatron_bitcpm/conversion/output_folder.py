"""Outputs that are complete or absent: made beside their final place, locked, renamed at the end.

The folder in which one is made is hidden and carries a lock that ends with its process, so that
what a killed process left behind can be told from the work of a living one and is removed by the
next run.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_bitcpm.checkpoint.model_file import MODEL_FILE
from megatron_bitcpm.checkpoint.store import TRACKER
from megatron_bitcpm.conversion.megatron.folder import RELEASE
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import publish_folder, sync

_OLD = ".old"


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder to fill; at the end of the block it becomes `output`.

    Args:
        output: its final place, without symbolic links; parents are made.
        overwrite: replace a model that is there: a Hugging Face folder or a converted checkpoint.

    Raises:
        CheckpointError: `output` exists, or cannot be written. Then, and after any other error in
            the block, nothing is left behind and an old output is as it was.
    """
    with _scratch_beside(output) as scratch:
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            _check_replaceable(output, overwrite, _is_model(output))
        yield scratch
        publish_folder(scratch, output)


@contextmanager
def new_file(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a place for a file; at the end of the block it becomes `output`.

    Arguments and errors as in `new_folder`; only a file is replaced.
    """
    with _scratch_beside(output) as scratch:
        if output.exists():
            _check_replaceable(output, overwrite, output.is_file())
        path = scratch / output.name
        yield path
        sync(path)
        os.replace(path, output)
        sync(output.parent)


@contextmanager
def _scratch_beside(output: Path) -> Iterator[Path]:
    scratch: Path | None = None
    lock = -1
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        clean_up_after_killed(output)
        scratch, lock = _make_locked(output)
        yield scratch
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError.of(
            "output", output, f"cannot be written: {reason}".rstrip("."),
            "Free space, or name another place",
        ) from error  # fmt: skip
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def clean_up_after_killed(output: Path) -> None:
    """Remove what killed processes left beside an output, and bring an old output back.

    Killed between the two renames that replace a folder, a process leaves the old one under a
    hidden name and nothing in its place.

    Args:
        output: the final place whose scratch folders are meant.
    """
    pattern = re.compile(re.escape(f".tmp-{output.name}-") + r"[a-z0-9_]{8}")
    names = os.listdir(output.parent)
    for name in names:
        old = output.parent / (_OLD + name)
        if pattern.fullmatch(name) and (lock := _try_lock(output.parent / name)) >= 0:
            if old.exists() and not output.exists():
                os.rename(old, output)
            shutil.rmtree(output.parent / name, ignore_errors=True)
            os.close(lock)
    for name in names:
        scratch = output.parent / name.removeprefix(_OLD)
        if not name.startswith(_OLD) or not pattern.fullmatch(scratch.name) or scratch.exists():
            continue
        # Its scratch folder got its final name: that process holds the lock of the output now.
        if (lock := _try_lock(output)) >= 0:
            shutil.rmtree(output.parent / name, ignore_errors=True)
            os.close(lock)


def _is_model(output: Path) -> bool:
    """Whether a folder holds a model and may be replaced, which deletes it; never a run's."""
    if (output / "config.json").is_file():
        return True
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    return names == {RELEASE, TRACKER} and (output / RELEASE / MODEL_FILE).is_file()


def _check_replaceable(output: Path, overwrite: bool, is_model: bool) -> None:
    if not overwrite:
        raise CheckpointError.of("output", output, "exists", "Name a new one, or add --overwrite")
    if not is_model:
        raise CheckpointError.of(
            "output",
            output,
            "exists and is no converted model, so it is not replaced",
            "Name a new one",
        )


def _make_locked(output: Path) -> tuple[Path, int]:
    """Return a new scratch folder and its open lock, -1 where the file system has no locks."""
    while True:
        # Not `mkdtemp`, whose folders are private whatever the umask says.
        scratch = output.parent / f".tmp-{output.name}-{secrets.token_hex(4)}"
        scratch.mkdir()
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # cleaned up by another process before it could be locked
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process is about to clean it up
            os.close(lock)
            continue
        except OSError:
            os.close(lock)
            return scratch, -1
        if scratch.exists():
            return scratch, lock
        os.close(lock)


def _try_lock(folder: Path) -> int:
    """Return an open lock of a folder that no living process works on, -1 otherwise."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return -1
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return -1
    return lock


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people to read too."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
