"""Write a checkpoint as a plain-Llama Hugging Face folder: complete and verified, or absent.

Ternary checkpoints are written pseudo-quantised: the values of the training forward, in its dtype,
under Llama's names. Transformers and vLLM load the folder as an ordinary model. Every export is
compared with the checkpoint before it gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_bitcpm.checkpoint.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    check_expressible,
    generation_config,
    llama_config,
    read_tokenizer_ids,
)
from megatron_bitcpm.checkpoint.hf_tensors import INDEX_FILE, WEIGHTS_FILE
from megatron_bitcpm.checkpoint.megatron_to_hf import (
    iter_hf_tensors,
    list_ternary_tensors,
    read_stamp,
    vocabulary_size,
)
from megatron_bitcpm.checkpoint.model_card import write_model_card
from megatron_bitcpm.checkpoint.reader import CheckpointReader
from megatron_bitcpm.checkpoint.verify import QUANTIZER_FILE, verify_tensors
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import TOKENIZER_FILES, hash_files, publish_folder
from megatron_bitcpm.version import __version__

MAX_SHARD_BYTES = 5_000_000_000
FORMAT_VERSION = 1
"""Version of ``bitcpm_quantizer.json``."""


_BESIDE_TOKENIZER = ("bitcpm_tokenizer.json", "chat_template.jinja", "chat_template.json")


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a checkpoint as a Hugging Face folder, and verify it.

    Args:
        checkpoint: a checkpoint, or a run's folder (its newest checkpoint).
        output: folder to write; its parents are made.
        tokenizer: tokenizer folder; default the one the run was configured with.
        overwrite: replace `output` when it is a model folder.
        max_shard_bytes: larger models are cut into files of about this size, which is also the
            memory that is needed.
    Returns:
        The report of `verify`, and iteration, tokens, valid_loss, seq_length, files, bytes.

    Raises:
        CheckpointError: bad input; nothing is left behind and an old output is as it was.
    """
    output = Path(os.path.realpath(output))
    reader = CheckpointReader(checkpoint)
    check_expressible(reader.config.model)
    read_stamp(reader)  # refuses a quantiser that has no such form
    _check_output(output, overwrite)
    tokenizer_folder = _check_tokenizer(reader, tokenizer)
    if max_shard_bytes < 1:
        raise CheckpointError.of("max_shard_bytes", max_shard_bytes, "is no size", "Use 5000000000")
    scratch: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".tmp-{output.name}-", dir=output.parent))
        scratch.chmod(0o755)  # mkdtemp makes it private
        report = _fill(scratch, reader, tokenizer_folder, max_shard_bytes)
        publish_folder(scratch, output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError.of(
            "output", output, f"cannot be written: {reason}".rstrip("."),
            "Free space, or name another folder",
        ) from error  # fmt: skip
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return {**report, "folder": str(output)}


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a model folder: replacing deletes."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise CheckpointError.of(
            "output", output, "exists", "Name a new folder, or add --overwrite"
        )
    if not (output / CONFIG_FILE).is_file():
        raise CheckpointError.of(
            "output", output, "exists and is no model folder, so it is not replaced",
            "Name a new folder",
        )  # fmt: skip


def _check_tokenizer(reader: CheckpointReader, tokenizer: str | Path | None) -> Path:
    folder = Path(tokenizer if tokenizer is not None else reader.config.data.tokenizer)
    read_tokenizer_ids(folder, vocabulary_size(reader))
    found, recorded = hash_files(folder, TOKENIZER_FILES), reader.state.get("tokenizer_sha256")
    if found != recorded:
        raise CheckpointError.of(
            "tokenizer", folder, "is not the one of the training (its files have another sha256)",
            "Name the tokenizer of the run (--tokenizer)",
        )  # fmt: skip
    return folder


def _fill(
    scratch: Path, reader: CheckpointReader, tokenizer: Path, max_shard_bytes: int
) -> dict[str, Any]:
    """Write all files of the folder; return the report."""
    files, total_bytes = _write_tensors(scratch, reader, max_shard_bytes)
    for name in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, scratch / name)
    ids = read_tokenizer_ids(scratch)
    dtype = reader.dtype("embedding.word_embeddings.weight")
    config = llama_config(reader.config.model, dtype, vocabulary_size(reader), ids)
    _write_json(scratch / CONFIG_FILE, config)
    _write_json(scratch / GENERATION_FILE, generation_config(ids))
    facts = _read_facts(reader)
    stamp = read_stamp(reader)
    groups = list_ternary_tensors(reader.config.model, stamp)
    if groups:
        _write_json(scratch / QUANTIZER_FILE, _describe_quantizer(reader, facts, groups))
    report = verify_tensors(scratch, groups, reader)
    card = write_model_card(
        config, facts, report if groups else None, stamp.quant if stamp else None
    )
    (scratch / "README.md").write_text(card, encoding="utf-8")
    return {**report, **facts, "files": files, "bytes": total_bytes}


def _write_tensors(
    scratch: Path, reader: CheckpointReader, max_shard_bytes: int
) -> tuple[list[str], int]:
    """Write the safetensors files, and their index where there are several."""
    shards: list[list[str]] = []
    total_bytes = 0
    for shard in _cut_shards(reader, max_shard_bytes):
        path = scratch / f"{len(shards) + 1:05d}.part"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append(list(shard))
        total_bytes += sum(t.numel() * t.element_size() for t in shard.values())
    files = [WEIGHTS_FILE]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(scratch / INDEX_FILE, index)
    for number, file in enumerate(files, start=1):
        path = scratch / f"{number:05d}.part"
        path.chmod(0o644)  # safetensors makes it private
        path.rename(scratch / file)
    return files, total_bytes


def _cut_shards(
    reader: CheckpointReader, max_shard_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in iter_hf_tensors(reader):
        tensor_bytes = tensor.numel() * tensor.element_size()
        if shard and size + tensor_bytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor_bytes
    yield shard


def _read_facts(reader: CheckpointReader) -> dict[str, Any]:
    state, seq_length = reader.state, reader.config.data.seq_length
    return {
        "iteration": state.get("iteration", 0),
        "tokens": state.get("consumed_samples", 0) * seq_length,
        "seq_length": seq_length,
        "valid_loss": state.get("valid_loss"),
    }


def _describe_quantizer(
    reader: CheckpointReader, facts: dict[str, Any], groups: dict[str, int]
) -> dict[str, Any]:
    """Return ``bitcpm_quantizer.json``: what reproduces the values, and where they are."""
    return {
        "format_version": FORMAT_VERSION,
        "format": "pseudo-quantized",
        "megatron_bitcpm": __version__,
        "quantizer": reader.state["quantizer"],
        "source": {"checkpoint": reader.folder.name, **facts},
        "ternary_tensors": groups,
    }


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
