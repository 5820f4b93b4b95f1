"""Checkpoint folders of a run: complete or absent.

A checkpoint is written to ``.tmp-iter_0000100`` and renamed to ``iter_0000100`` when every file is
on disk; the newest is named in ``latest_checkpointed_iteration.txt`` (Megatron's tracker file).
Beside Megatron's own files it holds ``bitcpm_config.yaml`` (the resolved configuration) and
``bitcpm_state.json`` (iteration, data position and quantiser stamp, readable without Megatron).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bitcpm.config import RunConfig, parse_config
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.files import publish_folder, write_text_atomically

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "bitcpm_config.yaml"
STATE_FILE = "bitcpm_state.json"
FORMAT_VERSION = 1
"""Version of our part of a checkpoint; raised when older readers would misread it."""


def iteration_name(iteration: int) -> str:
    """Return the folder name of an iteration, as Megatron writes it."""
    return f"iter_{iteration:07d}"


def begin_checkpoint(run_dir: Path, iteration: int) -> Path:
    """Make the empty scratch folder of a checkpoint (rank 0 only)."""
    scratch = run_dir / f".tmp-{iteration_name(iteration)}"
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    return scratch


def publish_checkpoint(
    scratch: Path, run_dir: Path, iteration: int, config: RunConfig, state: dict[str, Any]
) -> Path:
    """Turn a finished scratch folder into the checkpoint (rank 0 only).

    Args:
        scratch: folder from `begin_checkpoint`, Megatron's files complete.
        run_dir: the run's folder.
        iteration: optimizer steps done.
        config: the resolved configuration.
        state: contents of ``bitcpm_state.json``.
    """
    (scratch / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    text = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=2)
    (scratch / STATE_FILE).write_text(text + "\n", encoding="utf-8")
    target = run_dir / iteration_name(iteration)
    publish_folder(scratch, target)
    write_text_atomically(run_dir / TRACKER, str(iteration))
    return target


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder that a user's path means.

    Args:
        path: a checkpoint, or a run's folder (its newest checkpoint).

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    try:
        if (path / STATE_FILE).is_file():
            return path
        if not (path / TRACKER).is_file():
            raise CheckpointError.of(
                "checkpoint", path, "is neither a checkpoint nor a run with one",
                "Name the folder that holds latest_checkpointed_iteration.txt or an iter_* folder",
            )  # fmt: skip
        target = path / _read_tracker(path / TRACKER)
        if not (target / STATE_FILE).is_file():
            raise CheckpointError.of(
                "checkpoint", target, f"named by {TRACKER} but incomplete or absent",
                "Restore it, or write the number of another iter_* folder into that file",
            )  # fmt: skip
        return target
    except OSError as error:
        raise CheckpointError.of(
            "checkpoint", path, f"cannot be read: {error.strerror}", "Name a readable folder"
        ) from error


def _read_tracker(path: Path) -> str:
    """Return the name of the checkpoint folder that a tracker file names."""
    # Not `read_text`: a damaged file need not be UTF-8, and its content goes into the message.
    name = path.read_bytes()[:200].decode("ascii", errors="replace").strip()
    if re.fullmatch("[0-9]{1,18}", name):
        return iteration_name(int(name))
    if re.fullmatch("iter_[0-9]{1,18}", name):
        return name
    raise CheckpointError.of(
        "checkpoint", path, f"names no checkpoint ({name[:20]!r})",
        "Write the number of an iter_* folder into it",
    )  # fmt: skip


def _read(folder: Path, name: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError.of(
            "checkpoint", folder / name, lines[0].rstrip("."),
            "The checkpoint is damaged; use another one",
        ) from error  # fmt: skip


def read_state(folder: Path) -> dict[str, Any]:
    """Return ``bitcpm_state.json`` of a checkpoint.

    Raises:
        CheckpointError: unreadable, incomplete, or written by a newer format.
    """
    state = _read(folder, STATE_FILE, json.loads)
    if not isinstance(state, dict):
        raise _damaged_state(folder, "holds no JSON object")
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError.of(
            "format_version", version, f"this package reads {FORMAT_VERSION}",
            "Use the package version that wrote the checkpoint",
        )  # fmt: skip
    for key, least in (("iteration", 0), ("world_size", 1)):
        value = state.get(key)
        # A bool is an int in Python.
        if type(value) is not int or value < least:
            raise _damaged_state(folder, f"{key} is {value!r}, not a number from {least}")
    return state


def _damaged_state(folder: Path, rule: str) -> BitcpmError:
    return CheckpointError.of(
        "checkpoint", folder / STATE_FILE, rule, "The checkpoint is damaged; use another one"
    )


def read_config(folder: Path) -> RunConfig:
    """Return the resolved configuration of a checkpoint.

    Raises:
        CheckpointError: it or ``bitcpm_state.json`` is unreadable or incomplete.
    """
    world_size = read_state(folder)["world_size"]
    config: RunConfig = _read(
        folder, CONFIG_FILE, lambda text: parse_config(text, world_size=world_size)
    )
    return config
