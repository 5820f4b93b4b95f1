"""Which folder a path to a Megatron checkpoint means, and what the files beside its tensors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bitcpm.checkpoint.model_file import SIDE_FOLDER, read_model_file
from megatron_bitcpm.checkpoint.safe_load import METADATA_FILE
from megatron_bitcpm.checkpoint.store import (
    NEXT_FILE,
    STATE_FILE,
    find_checkpoint,
    find_tracked_folder,
    replaced_folder,
)
from megatron_bitcpm.data.tokenizer_ids import read_run_tokenizer, read_tokenizer_ids
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quantizer import Quantizer

SHARD_FILE = "model_optim_rng.pt"
RELEASE = "release"
"""Megatron's name for weights alone: it then looks for no optimizer and no random state."""


def kind_of_folder(folder: Path) -> str | None:
    """Return the format of a checkpoint's folder: torch_dist, legacy, or None for neither."""
    if (folder / METADATA_FILE).is_file():
        return "torch_dist"
    return "legacy" if any(folder.glob("mp_rank_*")) else None


def find_megatron_folder(path: str | Path) -> Path:
    """Return the folder with the tensors that a user's path means.

    Args:
        path: a checkpoint (``iter_*`` or ``release``), or the folder with its tracker file.

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
        raise CheckpointError(
            f"checkpoint={target}: is named by the tracker file but absent. Restore it, or name "
            "another folder."
        )
    if kind_of_folder(target) is None:
        raise CheckpointError(
            f"checkpoint={target}: holds neither .metadata (torch_dist) nor mp_rank_* (legacy). It "
            "is incomplete or of another format; name another folder."
        )
    return target


def resolve_vocab_size(
    folder: Path, rows: int, found: int | None, tokenizer: str | Path | None
) -> int:
    """Return how many ids a model has, without the rows that only pad its embedding.

    Args:
        folder: the checkpoint, for messages.
        rows: of the embedding.
        found: what the checkpoint says, None where it does not.
        tokenizer: tokenizer folder that the user named; must have as many ids as the checkpoint
            says, where it does.

    Raises:
        CheckpointError: unknown, or it does not fit.
    """
    # With fewer ids than were trained, trained rows would be taken for padding.
    size = found if tokenizer is None else read_tokenizer_ids(tokenizer, found).size
    if size is None:
        raise CheckpointError(
            f"checkpoint={folder}: does not say how many of the embedding's {rows} rows belong to "
            "the tokenizer. Name its tokenizer (--tokenizer)."
        )
    if not 1 <= size <= rows:
        raise CheckpointError(
            f"vocab_size={size}: the embedding of {folder} has {rows} rows. Name the tokenizer "
            "that the model was trained with (--tokenizer)."
        )
    return size


def converted_fields(folder: Path, tokenizer: str | Path | None) -> dict[str, Any]:
    """Return the fields of a `ModelSource` that ``bitcpm_model.json`` gives.

    Args:
        folder: a converted checkpoint.
        tokenizer: tokenizer folder that the user named; must fit.

    Raises:
        CheckpointError: the file is damaged, or the tokenizer is of another model.
    """
    found = read_model_file(folder)
    if tokenizer is not None:
        read_run_tokenizer(tokenizer, found.vocab_size, found.facts.get("tokenizer_sha256"))
    side_files = Path(tokenizer) if tokenizer is not None else folder / SIDE_FOLDER
    stamp = found.quantizer
    return {
        "form": found.form,
        "model": found.model,
        "vocab_size": found.vocab_size,
        "quantizer": None if stamp is None else Quantizer.from_stamp(stamp, folder),
        "folding": found.folding,
        "facts": found.facts,
        "side_files": side_files if side_files.is_dir() else None,
    }


def refuse_format(folder: Path, wanted: str) -> None:
    """Refuse a folder of the other format.

    Raises:
        CheckpointError: it is not of the wanted format.
    """
    kind = kind_of_folder(folder)
    if kind != wanted:
        raise CheckpointError(
            f"checkpoint={folder}: is no {wanted} checkpoint ({kind or 'no tensors found'}). Name "
            "another folder."
        )
