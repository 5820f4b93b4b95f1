"""Checkpoint folders of a run: complete or absent.

A checkpoint is written to ``.tmp-iter_0000100`` and renamed to ``iter_0000100`` when every file is
on disk; the newest is named in ``latest_checkpointed_iteration.txt`` (Megatron's tracker file).
Between the two renames ``.next_checkpoint`` says what is about to be published after what, so that
a crash there loses nothing, and an older checkpoint that a user names in the tracker is respected.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from megatron_bitcpm.checkpoint.model_file import MODEL_FILE
from megatron_bitcpm.config import RunConfig, parse_config
from megatron_bitcpm.errors import CheckpointError, refusal
from megatron_bitcpm.publish import set_aside, sync, sync_tree, write_text
from megatron_bitcpm.records import Record, explain

TRACKER = "latest_checkpointed_iteration.txt"
NEXT_FILE = ".next_checkpoint"
CONFIG_FILE = "bitcpm_config.yaml"
"""The resolved configuration of the run."""
STATE_FILE = "bitcpm_state.json"
"""Iteration, data position and quantiser stamp, readable without Megatron."""
OLD_PREFIX = ".old-"
FORMAT_VERSION = 2
"""Version of our part of a checkpoint; raised when older readers would misread it."""


def iteration_name(iteration: int) -> str:
    """Return the folder name of an iteration, as Megatron writes it."""
    return f"iter_{iteration:07d}"


def scratch_folder(run_dir: Path, iteration: int) -> Path:
    """Return where a checkpoint is written before it is complete."""
    return run_dir / f".tmp-{iteration_name(iteration)}"


def begin_checkpoint(run_dir: Path, iteration: int) -> Path:
    """Make the empty scratch folder of a checkpoint (rank 0 only)."""
    scratch = scratch_folder(run_dir, iteration)
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    return scratch


def publish_checkpoint(
    scratch: Path, run_dir: Path, iteration: int, config: RunConfig, state: dict[str, Any]
) -> Path:
    """Turn a scratch folder, Megatron's files complete, into the checkpoint (rank 0 only)."""
    (scratch / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    text = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=2)
    (scratch / STATE_FILE).write_text(text + "\n", encoding="utf-8")
    target = run_dir / iteration_name(iteration)
    old = replaced_folder(target)
    sync_tree(scratch)
    note = run_dir / NEXT_FILE
    with set_aside(target, old):
        try:
            # From here to the tracker a crash leaves a note that is true once the folder has its
            # name. After an error it goes before the old folder comes back, which it does not mean.
            write_text(note, f"{iteration} after {_tracker_text(run_dir)}\n")
            os.rename(scratch, target)
        except BaseException:
            note.unlink(missing_ok=True)
            raise
    sync(run_dir)
    write_text(run_dir / TRACKER, str(iteration))
    note.unlink()
    shutil.rmtree(old, ignore_errors=True)
    return target


def replaced_folder(target: Path) -> Path:
    """Return the name that an earlier checkpoint of the same step has while it is replaced."""
    return target.with_name(OLD_PREFIX + target.name)


def write_error(run_dir: Path, reason: str) -> CheckpointError:
    """Return the error of a checkpoint that could not be written."""
    return CheckpointError(
        f"checkpoint.directory={run_dir}: cannot be written: {reason}. Free space or name another "
        "folder; earlier checkpoints are as they were."
    )


def list_checkpoints(run_dir: Path) -> Iterator[tuple[int, Path]]:
    """Yield (iteration, folder) of a run's own checkpoints, newest first; no links."""
    found = []
    for path in run_dir.glob("iter_*") if run_dir.is_dir() else ():
        number = path.name.removeprefix("iter_")
        if not re.fullmatch("[0-9]{7,18}", number) or path.name != iteration_name(int(number)):
            continue
        if not path.is_symlink() and (path / STATE_FILE).is_file():
            found.append((int(number), path))
    yield from sorted(found, reverse=True)


def has_checkpoints(run_dir: Path) -> bool:
    """Whether a folder holds checkpoints or the traces of some: no place for a new run."""
    return (run_dir / TRACKER).exists() or next(list_checkpoints(run_dir), None) is not None


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder that a user's path means: itself, or a run's newest one."""
    path = Path(path)
    try:
        if (path / STATE_FILE).is_file():
            return path
        pending = pending_checkpoint(path)
        if pending is not None:
            return path / iteration_name(pending)
        target = find_tracked_folder(path)
        if target is None:
            _refuse_converted(path)
            fix = _name_newest(path) or f"Name the folder that holds {TRACKER} or an iter_* folder"
            raise CheckpointError(
                f"checkpoint={path}: is neither a checkpoint nor a run with one. {fix}."
            )
        if not target.exists() and replaced_folder(target).exists():
            target = replaced_folder(target)
        _refuse_converted(target)
        if damage := _damage(target):
            fix = _name_newest(path) or "Restore it; the run has no other complete checkpoint"
            raise CheckpointError(
                f"checkpoint={target}: is named by {TRACKER} but incomplete or absent: {damage}. "
                f"{fix}."
            )
        return target
    except OSError as error:
        raise CheckpointError(
            f"checkpoint={path}: cannot be read: {error.strerror}. Name a readable folder."
        ) from error


def _refuse_converted(folder: Path) -> None:
    if (folder / MODEL_FILE).is_file():
        raise CheckpointError(
            f"checkpoint={folder}: was converted from another format and holds weights alone. "
            "Begin a run with it: checkpoint.init_from."
        )


def find_tracked_folder(run_dir: Path) -> Path | None:
    """Return the folder that the tracker of a run names, whatever is in it; None without one."""
    path = run_dir / TRACKER
    if not path.is_file():
        return None
    # Not `read_text`: a damaged file need not be UTF-8, and its content goes into the message.
    name = path.read_bytes()[:200].decode("ascii", errors="replace").strip()
    if re.fullmatch("[0-9]{1,18}", name):
        return run_dir / iteration_name(int(name))
    if re.fullmatch("iter_[0-9]{1,18}|release", name):
        return run_dir / name
    raise CheckpointError(
        f"checkpoint={path}: does not name a checkpoint ({name[:20]!r}). Write the number of an "
        "iter_* folder into it."
    )


def pending_checkpoint(run_dir: Path) -> int | None:
    """Return the iteration that a crash kept from being named in the tracker, if there is one."""
    note = run_dir / NEXT_FILE
    if not note.is_file():
        return None
    match = re.fullmatch(r"([0-9]{1,18}) after (.{1,40})\n", note.read_text("ascii", "replace"))
    if match is None or match[2] != _tracker_text(run_dir):
        return None
    iteration = int(match[1])
    return None if _damage(run_dir / iteration_name(iteration)) else iteration


def _tracker_text(run_dir: Path) -> str:
    tracker = run_dir / TRACKER
    return tracker.read_text("ascii", "replace").strip()[:40] if tracker.is_file() else "nothing"


def _damage(folder: Path) -> str | None:
    """Return what a checkpoint lacks, None when it is complete."""
    from megatron_bitcpm.checkpoint.safe_load import find_damage

    for name in (STATE_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            return f"no {name}" if folder.is_dir() else "no such folder"
    try:
        return find_damage(folder)
    except CheckpointError as error:
        return str(error).removeprefix(f"checkpoint={folder}/").split(". ")[0]


def _name_newest(run_dir: Path) -> str | None:
    for iteration, folder in list_checkpoints(run_dir):
        if _damage(folder) is None:
            return f"Write {iteration} into {TRACKER} to use {folder.name}, the newest complete one"
    return None


def _read(folder: Path, name: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise refusal(folder / name, lines[0].rstrip(".")) from error


class _Numbers(Record):
    iteration: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(ge=1)]
    consumed_samples: Annotated[int, Field(ge=0)] = 0


def read_state(folder: Path) -> dict[str, Any]:
    """Return ``bitcpm_state.json`` of a checkpoint."""
    state = _read(folder, STATE_FILE, json.loads)
    if not isinstance(state, dict):
        raise refusal(folder / STATE_FILE, "holds no JSON object")
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version={version}: this package reads {FORMAT_VERSION}. Use the package "
            "version that wrote the checkpoint."
        )
    try:
        _Numbers.model_validate(state)
    except ValidationError as error:
        raise refusal(folder / STATE_FILE, explain(error)) from error
    return state


def read_config(folder: Path) -> RunConfig:
    """Return the resolved configuration of a checkpoint."""
    world_size = read_state(folder)["world_size"]
    parse = functools.partial(parse_config, world_size=world_size)
    config: RunConfig = _read(folder, CONFIG_FILE, parse)
    return config
