"""Which checkpoints of a run stay, and what a crash left behind.

A checkpoint loses its name in one rename before its files go: a crash never leaves half of one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import IO

from megatron_bitcpm.checkpoint.store import (
    NEXT_FILE,
    OLD_PREFIX,
    TRACKER,
    list_checkpoints,
    pending_checkpoint,
)
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.publish import open_locked, sync, write_text

logger = logging.getLogger(__name__)

_DELETED = ".deleted-"
# Scratch names of checkpoints and of the files of a run; a user's own are not ours to delete.
_OURS = re.compile(
    r"\.(tmp|old|deleted)-iter_[0-9]{7,18}"
    rf"|\.tmp-({re.escape(TRACKER)}|{re.escape(NEXT_FILE)}|metrics\.jsonl|writable)"
)


def delete_surplus(
    run_dir: Path, newest: int, keep_last_n: int | None, keep_every_n: int | None
) -> list[int]:
    """Delete the checkpoints of a run that its retention does not keep; return them (rank 0 only).

    `newest` was just published; later ones, of a course that was left, are not touched. The
    `keep_last_n` newest are kept (None: all), and the multiples of `keep_every_n`. A folder that
    cannot be removed is only logged.
    """
    if keep_last_n is None:
        return []
    candidates = [(n, path) for n, path in list_checkpoints(run_dir) if n <= newest]
    deleted = []
    for iteration, path in candidates[keep_last_n:]:
        if iteration == newest or (keep_every_n and iteration % keep_every_n == 0):
            continue
        try:
            _delete(path)
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", path, error.strerror)
        else:
            deleted.append(iteration)
    return deleted


def _delete(path: Path) -> None:
    doomed = path.with_name(_DELETED + path.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    sync(path.parent)
    shutil.rmtree(doomed)


def lock_run(run_dir: Path) -> IO[str]:
    """Lock a run's folder, or refuse it, until the result is closed or the process ends."""
    try:
        lock, _ = open_locked(run_dir / ".lock", os.O_CREAT | os.O_WRONLY)
    except BlockingIOError as error:
        raise BitcpmError(
            f"checkpoint.directory={run_dir}: another run is writing there. Wait for its end, "
            "stop it, or name another folder."
        ) from error
    return os.fdopen(lock, "w")


def clean_leftovers(run_dir: Path) -> None:
    """Finish or undo what a crash interrupted (rank 0 only, with the lock, before a run writes).

    A published checkpoint gets into the tracker, one that was being replaced gets its name back,
    and scratch files go.
    """
    if not run_dir.is_dir():
        return
    iteration = pending_checkpoint(run_dir)
    if iteration is not None:
        write_text(run_dir / TRACKER, str(iteration))
    (run_dir / NEXT_FILE).unlink(missing_ok=True)
    # Only after the note is gone: it speaks of the folder that did not get the name.
    for path in sorted(run_dir.glob(f"{OLD_PREFIX}iter_*")):
        name = path.with_name(path.name.removeprefix(OLD_PREFIX))
        if not name.exists():
            os.rename(path, name)
    for path in run_dir.iterdir():
        if not _OURS.fullmatch(path.name) or path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
