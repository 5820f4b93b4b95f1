"""Which folder a path to a Megatron checkpoint means."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_bitcpm.checkpoint.safe_load import METADATA_FILE
from megatron_bitcpm.checkpoint.store import (
    NEXT_FILE,
    STATE_FILE,
    find_checkpoint,
    find_tracked_folder,
    replaced_folder,
)
from megatron_bitcpm.errors import CheckpointError, refusal

SHARD_FILE = "model_optim_rng.pt"
RELEASE = "release"
"""Megatron's name for weights alone: it then looks for no optimizer and no random state."""
MAX_LAYERS = 10_000
"""Far above any model, and few enough to name every tensor of one."""
OTHER_MODEL = "Only Llama and MiniCPM decoders are converted"


def kind_of_folder(folder: Path) -> Literal["torch_dist", "legacy"] | None:
    """Return the format of a checkpoint's folder: torch_dist, legacy, or None for neither."""
    if (folder / METADATA_FILE).is_file():
        return "torch_dist"
    return "legacy" if any(folder.glob("mp_rank_*")) else None


def find_megatron_folder(path: str | Path) -> Path:
    """Return the folder with the tensors: a checkpoint, or what the tracker file in a folder names.

    Raises:
        CheckpointError: there is none, or the one that the tracker names is absent.
    """
    path = Path(path)
    if kind_of_folder(path) is not None:
        return path
    # The trainer of this package recovers what a crash has left; `find_checkpoint` knows how.
    if (path / STATE_FILE).is_file() or (path / NEXT_FILE).is_file():
        return find_checkpoint(path)
    target = find_tracked_folder(path)
    if target is None or (target / STATE_FILE).is_file():
        return find_checkpoint(path)
    if not target.is_dir():
        # May be one of the trainer that was being replaced.
        if replaced_folder(target).is_dir():
            return find_checkpoint(path)
        rule = "is named by the tracker file but absent"
        raise refusal(target, rule, "Restore it, or name another folder")
    if kind_of_folder(target) is None:
        raise unknown_format(target)
    return target


def unknown_format(folder: Path) -> CheckpointError:
    """Build the error of a folder without tensors."""
    return refusal(
        folder,
        "holds neither .metadata (torch_dist) nor mp_rank_* (legacy)",
        "It is incomplete or of another format; name another folder",
    )
