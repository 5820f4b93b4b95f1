"""Outputs that are complete or absent: made beside their place, flushed, renamed at the end.

The hidden folder in which one is made carries a lock that ends with its process. So the next run
tells what a killed process left behind from the work of a living one, and removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_bitcpm.errors import BitcpmError, CheckpointError, one_line

_OLD = ".old"


@dataclass(frozen=True)
class Output:
    """A file or folder to write; after an error there is only what was there before.

    An empty folder may be in its place whatever `overwrite` says. `error` is raised where it exists
    or cannot be written, and names it by the argument `field`.
    """

    path: Path
    overwrite: bool
    field: str = "output"
    error: type[BitcpmError] = CheckpointError
    why_kept: Callable[[Path], str | None] = lambda path: None
    """Says why an old output must not be deleted, None where it may."""
    make_parents: bool = True

    def new_folder(self) -> AbstractContextManager[Path]:
        """Give an empty folder to fill; at the end of the block it becomes the output."""
        return self._publish([self.path], lambda scratch: replace_folder(scratch, self.path))

    def new_files(self, targets: Sequence[Path]) -> AbstractContextManager[Path]:
        """Give a folder for files that become the targets; the last says that all are there."""
        return self._publish(targets, lambda scratch: _move_files(scratch, targets))

    @contextmanager
    def new_file(self) -> Iterator[Path]:
        """Give a place for a file; at the end of the block it becomes the output."""
        with self.new_files([self.path]) as scratch:
            yield scratch / self.path.name

    @contextmanager
    def _publish(self, targets: Sequence[Path], move: Callable[[Path], None]) -> Iterator[Path]:
        if not self.path.name or "\0" in str(self.path):
            place = str(self.path)
            raise self.error(f"{self.field}={place!r}: is not a valid name. Name a new one.")
        with self.explain():
            if self.make_parents:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with scratch_beside(self.path) as scratch:
                self._check_replaceable(targets)
                yield scratch
                sync_tree(scratch)
                # Writing takes long: the output may have come into being meanwhile.
                self._check_replaceable(targets)
                move(scratch)

    @contextmanager
    def explain(self) -> Iterator[None]:
        """Name the argument in what the operating system refuses within the block."""
        try:
            yield
        except OSError as error:
            raise self.error(
                f"{self.field}={self.path}: cannot be written: "
                f"{one_line(error.strerror or error)}. Free space, or name another place."
            ) from error

    def _check_replaceable(self, targets: Sequence[Path]) -> None:
        for target in targets:
            if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
                continue
            name = "" if target == self.path else f" {target.name}"
            rule, fix = "exists", "add --overwrite"
            if self.overwrite:
                reason = self.why_kept(target)
                if reason is None:
                    continue
                rule, fix = f"exists and {reason}", "remove it yourself"
            raise self.error(f"{self.field}={self.path}:{name} {rule}. Name a new one, or {fix}.")


@contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """Give an empty hidden folder beside a place; it goes at the end of the block."""
    clean_up_after_killed(output)
    while True:
        # Not `mkdtemp`, whose folders are private whatever the umask says.
        scratch = output.with_name(f".tmp-{output.name}-{secrets.token_hex(4)}")
        scratch.mkdir()
        # Until it is locked, another process may clean it up.
        with suppress(BlockingIOError, FileNotFoundError):
            lock, _ = open_locked(scratch)
            if scratch.exists():
                break
            os.close(lock)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def clean_up_after_killed(output: Path) -> None:
    """Remove what killed processes left beside an output, and bring an old output back.

    Killed between the renames of `replace_folder`, a process leaves only the old folder, hidden.
    """
    pattern = re.compile(re.escape(f".tmp-{output.name}-") + r"[a-z0-9_]{8}")
    for name in {name.removeprefix(_OLD) for name in os.listdir(output.parent)}:
        if not pattern.fullmatch(name):
            continue
        scratch, old = output.with_name(name), output.with_name(_OLD + name)
        try:  # The lock went with the folder where that became the output.
            lock, is_locked = open_locked(scratch if scratch.exists() else output)
        except OSError:  # a living process works on it, or it is gone
            continue
        if is_locked:
            if old.exists() and not output.exists():
                os.rename(old, output)
            _remove(scratch)
            _remove(old)
        os.close(lock)


def open_locked(path: Path, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> tuple[int, bool]:
    """Open and lock a folder or file until the descriptor is closed or the process ends.

    Returns the descriptor, and whether it is locked: False where the file system has no locks.
    Raises BlockingIOError where another process holds the lock.
    """
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        return descriptor, False
    return descriptor, True


def replace_folder(scratch: Path, target: Path) -> None:
    """Give a complete folder its name; what was there before goes only then."""
    old = scratch.with_name(_OLD + scratch.name)
    with set_aside(target, old):
        os.rename(scratch, target)
    sync(target.parent)
    _remove(old)


@contextmanager
def set_aside(target: Path, old: Path) -> Iterator[None]:
    """Move a folder away, if it is there, while the block replaces it; back if that fails."""
    try:
        if target.exists():
            os.rename(target, old)
        yield
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _move_files(scratch: Path, targets: Sequence[Path]) -> None:
    if len(targets) > 1:  # a crash must not leave the old manifest beside new data
        targets[-1].unlink(missing_ok=True)
    moved: list[Path] = []
    try:
        for target in targets:
            os.replace(scratch / target.name, target)
            moved.append(target)
    except OSError:
        for target in moved:
            target.unlink(missing_ok=True)
        raise
    sync(targets[0].parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file of a folder that one process writes into; killed, it leaves `.tmp-*`."""
    scratch = path.with_name(f".tmp-{path.name}")
    try:
        scratch.write_text(text, encoding="utf-8")
        sync(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)


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
