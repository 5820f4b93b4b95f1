"""Where converted Megatron checkpoints are written: a folder that is complete or absent.

    OUTPUT/latest_checkpointed_iteration.txt    "release"
    OUTPUT/release/                             tensors, bitcpm_model.json
    OUTPUT/release/hf/                          tokenizer, chat template, ... byte for byte

All of it is made beside the output under a hidden name, flushed, compared with the source, and then
renamed as a whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.hf_config import CONFIG_FILE
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import Place
from megatron_bitcpm.checkpoint.model_file import MODEL_FILE, SIDE_FOLDER, ModelFile
from megatron_bitcpm.checkpoint.store import TRACKER
from megatron_bitcpm.conversion.hf.side_files import copy_companions, find_original_config
from megatron_bitcpm.conversion.megatron.folder import RELEASE
from megatron_bitcpm.conversion.output_folder import new_folder
from megatron_bitcpm.conversion.source import ModelSource

Check = Callable[[Path], dict[str, Any]]


def write_megatron(
    source: ModelSource,
    output: str | Path,
    fill: Callable[[Path], ModelFile],
    *,
    overwrite: bool,
    check: Check | None,
) -> dict[str, Any]:
    """Make a checkpoint's folder around the files that `fill` writes.

    Args:
        source: the model.
        output: the folder; made if absent.
        fill: writes the tensors' files into an empty folder and describes the model.
        overwrite: replace a converted checkpoint that is there.
        check: compares the written checkpoint with the source; raises on a difference.

    Returns:
        folder, files, bytes, write_seconds, verify_seconds, verify (what `check` returned).

    Raises:
        CheckpointError: the output exists or cannot be written; an existing one is as it was.
    """
    output = Path(os.path.realpath(output))
    with new_folder(output, overwrite) as scratch:
        begin = time.perf_counter()
        folder = scratch / RELEASE
        folder.mkdir()
        described = fill(folder)
        (folder / MODEL_FILE).write_text(described.to_json(), encoding="utf-8")
        _copy_side_files(source, folder / SIDE_FOLDER)
        (scratch / TRACKER).write_text(RELEASE, encoding="ascii")
        written = time.perf_counter()
        report = None if check is None else check(folder)
        verified = time.perf_counter()
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    return {
        "folder": str(output / RELEASE),
        "files": list(sizes),
        "bytes": sum(sizes.values()),
        "padded_vocab_size": described.padded_vocab_size,
        "layout": described.layout,
        "write_seconds": round(written - begin, 3),
        "verify_seconds": round(verified - written, 3),
        "verify": report,
    }


def _copy_side_files(source: ModelSource, target: Path) -> None:
    folder = source.side_files
    if folder is None:
        return
    target.mkdir()
    copy_companions(folder, target)
    if original := find_original_config(source):
        shutil.copyfile(original, target / CONFIG_FILE)


def describe_model(
    source: ModelSource, model: ModelConfig, rows: int, layout: dict[str, int]
) -> ModelFile:
    """Return the content of ``bitcpm_model.json``.

    Args:
        source: the model.
        model: its architecture as Megatron holds it.
        rows: of the embedding, with its padding.
        layout: sizes that the files are cut for.
    """
    return ModelFile(
        form=source.form,
        model=model,
        vocab_size=source.vocab_size,
        padded_vocab_size=rows,
        quantizer=None if source.quantizer is None else source.quantizer.stamp(),
        folding=source.folding,
        facts=source.facts,
        layout=layout,
    )


def main_dtype(source: ModelSource) -> torch.dtype:
    """Return the type that a run would have said: that of the first layer's last projection."""
    spec = [spec for spec in source.model.family.tensors if spec.role == "projection"][-1]
    return source.dtype(Place(spec, 0, 0).name("hf"))
