"""Beginning a run with the weights of another model: where they are, and what must be the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.checkpoint.model_file import MODEL_FILE, SIDE_FOLDER, read_model_file
from megatron_bitcpm.checkpoint.store import (
    find_checkpoint,
    find_tracked_folder,
    read_config,
    read_state,
)
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.errors import CheckpointError, ConfigError
from megatron_bitcpm.files import TOKENIZER_FILES, tokenizer_sha256

_MAY_DIFFER = {
    "init_method_std",  # there is nothing to initialise
    "make_vocab_size_divisible_by",  # the shape of the embedding is compared
    "max_position_embeddings",  # no weights depend on these two: a longer context is a next stage
    "rope_scaling",
    "kv_channels",  # compared as head_dim, its default resolved
}


@dataclass(frozen=True)
class Origin:
    """A torch_dist checkpoint to begin with; the hash is None where it has no tokenizer."""

    folder: Path
    model: ModelConfig
    tokenizer_sha256: str | None


def find_origin(path: str | Path) -> Origin:
    """Return the weights that `checkpoint.init_from` means: a checkpoint, or a run's newest one."""
    path = Path(path)
    folder = path if (path / MODEL_FILE).is_file() else find_tracked_folder(path)
    if folder is None or not (folder / MODEL_FILE).is_file():
        folder = find_checkpoint(path)
        sha256 = read_state(folder).get("tokenizer_sha256")
        return Origin(folder, read_config(folder).model, sha256)
    converted = read_model_file(folder)
    if not (folder / ".metadata").is_file():
        raise CheckpointError(
            f"checkpoint.init_from={folder}: is not in the torch_dist format. Convert it with "
            "bitcpm convert --format torch_dist."
        )
    side_files = folder / SIDE_FOLDER
    has_tokenizer = any((side_files / name).is_file() for name in TOKENIZER_FILES)
    sha256 = tokenizer_sha256(side_files) if has_tokenizer else None
    return Origin(folder, converted.model, sha256)


def check_init_from(config: RunConfig, saved: ModelConfig, folder: Path) -> None:
    """Refuse to begin with the weights of another architecture; one line for each setting.

    Layout, precision, quantiser, data, optimizer and the length of the context may differ.
    """
    names = [name for name in type(config.model).model_fields if name not in _MAY_DIFFER]
    problems = [
        (
            f"model.{name if name != 'head_dim' else 'kv_channels'}={getattr(config.model, name)}: "
            f"checkpoint.init_from {folder} has {getattr(saved, name)}. Use that value, or begin "
            "with another checkpoint."
        )
        for name in [*names, "head_dim"]
        if getattr(config.model, name) != getattr(saved, name)
    ]
    if problems:
        raise ConfigError(problems)
