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
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_bitcpm.checkpoint.model_file import MODEL_FILE, SIDE_FOLDER
from megatron_bitcpm.checkpoint.store import TRACKER
from megatron_bitcpm.conversion.megatron.folder import RELEASE, SHARD_FILE
from megatron_bitcpm.errors import CheckpointError, one_line
from megatron_bitcpm.files import (
    TOKENIZER_FILES,
    publish_folder,
    sync,
    write_text_atomically,
)

_OLD = ".old"

_Known = Mapping[str, Any]
"""Patterns of names -> None for a file, what is known in it for a folder."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_MODEL_NAMES = (
    *_WEIGHTS,
    *TOKENIZER_FILES,
    "*.index.json",
    "config.json",
    "config.json.bak*",
    "generation_config.json",
    "bitcpm_*.json",
    "chat_template.*",
    "modeling_*.py",
    "configuration_*.py",
    "tokenization_*.py",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    ".gitattributes",
)
_MODEL: _Known = {**dict.fromkeys(_MODEL_NAMES), "additional_chat_templates": {"*": None}}
_RELEASE: _Known = {
    MODEL_FILE: None,
    SIDE_FOLDER: _MODEL,
    "mp_rank_*": {SHARD_FILE: None},
    **dict.fromkeys(("*.distcp", ".metadata", "metadata.json", "common.pt")),
}
_CHECKPOINT: _Known = {TRACKER: None, RELEASE: _RELEASE}
_OLD_TORCH_FILE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How `torch.save` began its files before they were archives."""


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
        _check_replaceable(output, overwrite, _why_no_model)
        yield scratch
        # Writing takes long: the output may have come into being meanwhile.
        _check_replaceable(output, overwrite, _why_no_model)
        publish_folder(scratch, output)


@contextmanager
def new_file(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a place for a file; at the end of the block it becomes `output`.

    Arguments and errors as in `new_folder`; only a file of tensors is replaced.
    """
    with _scratch_beside(output) as scratch:
        _check_replaceable(output, overwrite, _why_no_tensors)
        path = scratch / output.name
        yield path
        sync(path)
        _check_replaceable(output, overwrite, _why_no_tensors)
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
        raise CheckpointError(
            f"output={output}: cannot be written: {one_line(reason)}. Free space, or name "
            "another place."
        ) from error
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


def _check_replaceable(
    output: Path, overwrite: bool, why_kept: Callable[[Path], str | None]
) -> None:
    """Refuse an output that is there, unless it may be deleted; an empty folder may."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"output={output}: exists. Name a new one, or add --overwrite.")
    reason = why_kept(output)
    if reason is not None:
        raise CheckpointError(
            f"output={output}: exists and {reason}. Name a new one, or remove it yourself."
        )


def _why_no_model(output: Path) -> str | None:
    """Return why a folder must not be deleted as an old model, None where it may.

    It may only if all of it is what models consist of: among anything else somebody's work can be.
    """
    rule = "is no converted model, so it is not replaced"
    if not output.is_dir():
        return f"{rule} (it is a file)"
    is_checkpoint = (output / TRACKER).is_file() and (output / RELEASE / MODEL_FILE).is_file()
    has_weights = any(any(output.glob(pattern)) for pattern in _WEIGHTS)
    foreign = _find_foreign(output, _CHECKPOINT if is_checkpoint else _MODEL)
    if foreign is not None:
        return f"{rule} (it holds {foreign.relative_to(output)}, which is no part of one)"
    if not is_checkpoint and not ((output / "config.json").is_file() and has_weights):
        return f"{rule} (it has no config.json with weights)"
    return None


def _find_foreign(folder: Path, known: _Known) -> Path | None:
    """Return the first entry, by name, that is not among the known ones."""
    for path in sorted(folder.iterdir()):
        pattern = next((p for p in known if fnmatchcase(path.name, p)), None)
        if pattern is None or path.is_dir() != (known[pattern] is not None):
            return path
        if known[pattern] is not None and (found := _find_foreign(path, known[pattern])):
            return found
    return None


def _why_no_tensors(output: Path) -> str | None:
    """Return why a file must not be deleted as old weights, None where it may; by its beginning."""
    rule = "is no file of tensors, so it is not replaced"
    if not output.is_file():
        return rule
    if zipfile.is_zipfile(output):
        try:
            with zipfile.ZipFile(output) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, ValueError):
            names = []
        return None if any(name.endswith("/data.pkl") for name in names) else rule
    with output.open("rb") as stream:
        start = stream.read(len(_OLD_TORCH_FILE))
    is_safetensors = start[8:9] == b"{" and (
        int.from_bytes(start[:8], "little") <= output.stat().st_size - 8
    )
    return None if is_safetensors or start == _OLD_TORCH_FILE else rule


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


def check_report(path: Path, inputs: Sequence[Path]) -> None:
    """Refuse a place for a Markdown report before the work for it begins.

    Args:
        path: of the report; an older report, by its suffix, may be there.
        inputs: files and folders that are read: the report must not get into them.

    Raises:
        CheckpointError: it cannot be written there, or must not be.
    """
    with _explain_report(path):
        real = Path(os.path.realpath(path))
        rule, fix = None, "Name another file"
        for read in inputs:
            folder = Path(os.path.realpath(read))
            # A single weights file stands for its folder.
            if (folder.parent / "config.json").is_file() and folder.is_file():
                folder = folder.parent
            if folder == real or folder in real.parents:
                rule = f"would change the input {read}"
        if rule is None and path.is_dir():
            rule, fix = "is a folder", "Name a file in it"
        elif rule is None and path.exists() and path.suffix.lower() != ".md":
            rule = "exists and is no .md file, so it is not replaced"
        elif rule is None and not path.parent.is_dir():
            rule, fix = f"there is no folder {path.parent}", "Make it, or name another file"
        elif rule is None and not os.access(path.parent, os.W_OK | os.X_OK):
            rule = f"the folder {path.parent} cannot be written to"
    if rule is not None:
        raise CheckpointError(f"markdown={path}: {rule}. {fix}.")


def write_report(path: Path, text: str) -> None:
    """Write a Markdown report whose place was checked.

    Raises:
        CheckpointError: the disk is full, for example; an older report is as it was.
    """
    with _explain_report(path):
        write_text_atomically(path, text)


@contextmanager
def _explain_report(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"markdown={path}: cannot be written: {reason}. Name another file."
        ) from error
