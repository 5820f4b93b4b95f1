"""Opens checkpoints of Megatron: of our trainer, converted ones, and those of `pretrain_gpt.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bitcpm.checkpoint.model_file import MODEL_FILE, SIDE_FOLDER, read_model_file
from megatron_bitcpm.checkpoint.store import STATE_FILE, read_config, read_state
from megatron_bitcpm.conversion.megatron.folder import (
    find_megatron_folder,
    kind_of_folder,
    unknown_format,
)
from megatron_bitcpm.conversion.megatron.legacy_reader import LegacyTensors
from megatron_bitcpm.conversion.megatron.source import MegatronSource
from megatron_bitcpm.conversion.megatron.torch_dist_reader import TorchDistTensors
from megatron_bitcpm.data.tokenizer_ids import read_run_tokenizer, read_tokenizer_ids
from megatron_bitcpm.errors import DAMAGED, CheckpointError
from megatron_bitcpm.quantizer import Quantizer


def open_megatron(path: str | Path, tokenizer: str | Path | None = None) -> MegatronSource:
    """Open a checkpoint, torch_dist or legacy, by its own path or the folder with its tracker file.

    Args:
        tokenizer: folder; needed where the checkpoint does not say how many ids there are,
            otherwise it must fit.

    Raises:
        CheckpointError: there is none, it is damaged or unsafe, or a model not computed here.
    """
    folder = find_megatron_folder(path)
    kind = kind_of_folder(folder)
    if kind is None:
        raise unknown_format(folder)
    tensors: LegacyTensors | TorchDistTensors
    tensors = LegacyTensors(folder) if kind == "legacy" else TorchDistTensors(folder)
    is_stock = False
    if (folder / MODEL_FILE).is_file():
        fields = _converted_fields(folder)
    elif kind == "torch_dist" and (folder / STATE_FILE).is_file():
        fields = _trained_fields(folder)
    else:
        stock, is_stock = tensors.read_args(), True
        fields = {"form": "plain", "model": stock.model, "facts": stock.facts}
        fields["vocab_size"] = stock.vocab_size
    rows, side_files = tensors.check(fields["model"]), fields.get("side_files")
    if tokenizer is not None:
        side_files = Path(tokenizer)
        if not is_stock:
            known = fields["facts"].get("tokenizer_sha256")
            read_run_tokenizer(tokenizer, fields["vocab_size"], known)
    fields["vocab_size"] = _resolve_vocab_size(
        folder, rows, fields["vocab_size"], tokenizer if is_stock else None
    )
    fields["side_files"] = side_files if side_files and side_files.is_dir() else None
    return MegatronSource(path=folder, kind=kind, tensors=tensors, **fields)


def _converted_fields(folder: Path) -> dict[str, Any]:
    found = read_model_file(folder)
    return {
        "form": found.form,
        "model": found.model,
        "vocab_size": found.vocab_size,
        "quantizer": _read_stamp(found.quantizer, folder),
        "folding": found.folding,
        "facts": found.facts,
        "side_files": folder / SIDE_FOLDER,
    }


def _trained_fields(folder: Path) -> dict[str, Any]:
    state, config = read_state(folder), read_config(folder)
    size, seq_length = state.get("vocab_size"), config.data.seq_length
    if type(size) is not int:
        raise CheckpointError(f"vocab_size={size}: must be a whole number, in {folder}. {DAMAGED}.")
    quantizer = _read_stamp(state.get("quantizer"), folder)
    return {
        "form": "plain" if quantizer is None else "latent",
        "model": config.model,
        "vocab_size": size,
        "quantizer": quantizer,
        "facts": {
            "iteration": state.get("iteration", 0),
            "tokens": state.get("consumed_samples", 0) * seq_length,
            "seq_length": seq_length,
            "valid_loss": state.get("valid_loss"),
            "tokenizer_sha256": state.get("tokenizer_sha256"),
        },
        "side_files": Path(config.data.tokenizer),
    }


def _read_stamp(stamp: Any, folder: Path) -> Quantizer | None:
    return None if stamp is None else Quantizer.from_stamp(stamp, folder)


def _resolve_vocab_size(
    folder: Path, rows: int, found: int | None, tokenizer: str | Path | None
) -> int:
    """Return how many ids a model has, without the rows that only pad its embedding."""
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
