"""Opening a model of any format."""

from __future__ import annotations

from pathlib import Path

from megatron_bitcpm.arch.hf_config import CONFIG_FILE
from megatron_bitcpm.checkpoint.store import TRACKER
from megatron_bitcpm.conversion.hf.source import BIN_INDEX_FILE, INDEX_FILE, open_hf
from megatron_bitcpm.conversion.source import Kind, ModelSource
from megatron_bitcpm.errors import CheckpointError, describe, one_line

_HF_WEIGHTS = ("*.safetensors", INDEX_FILE, "pytorch_model*.bin", BIN_INDEX_FILE)


def open_source(path: str | Path, tokenizer: str | Path | None = None) -> ModelSource:
    """Open a Hugging Face folder, a Megatron checkpoint, or the newest one of a run, by its files.

    Args:
        tokenizer: folder for checkpoints that do not say how many ids their tokenizer has.

    Raises:
        CheckpointError: no model, an unknown architecture, or damaged files.
    """
    path = find_model(path)
    if path.is_file() and (path.parent / CONFIG_FILE).is_file():
        path = path.parent
    kind = detect_kind(path)
    if kind == "hf":
        return open_hf(path)
    # It brings a weight of imports of its own.
    from megatron_bitcpm.conversion.megatron.open import open_megatron

    return open_megatron(path, tokenizer)


def find_model(path: str | Path) -> Path:
    """Return the path of a model that a user named; there must be something."""
    path = Path(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _unknown(path, "no such file or folder") from error
    except (OSError, ValueError) as error:  # too long a name, or one with a NUL
        raise _unknown(path, describe(error)) from error
    return path


def detect_kind(path: Path) -> Kind:
    """Return which format a folder has, by the names in it; raise a CheckpointError for none."""
    if path.is_file():
        raise _unknown(path, "is a file, not a model")
    if any(next(path.glob(pattern), None) for pattern in _HF_WEIGHTS):
        return "hf"
    from megatron_bitcpm.conversion.megatron.folder import find_megatron_folder, kind_of_folder

    is_megatron = (path / TRACKER).is_file() or kind_of_folder(path) is not None
    if is_megatron or any(path.glob("iter_*")) or (path / "release").is_dir():
        return "legacy" if kind_of_folder(find_megatron_folder(path)) == "legacy" else "torch_dist"
    if (path / CONFIG_FILE).is_file():
        return "hf"  # whose weights are missed when it is opened
    raise _unknown(path, "holds neither a Hugging Face model nor a Megatron checkpoint")


def _unknown(path: Path, rule: str) -> CheckpointError:
    return CheckpointError(
        f"model={one_line(path)}: {rule}. Name a folder with config.json and weights, a run, or an "
        "iter_* or release folder."
    )
