"""Where converted Megatron checkpoints are written: a folder that is complete or absent.

    OUTPUT/latest_checkpointed_iteration.txt    "release"
    OUTPUT/release/                             tensors, bitcpm_model.json
    OUTPUT/release/hf/                          tokenizer, chat template, ... byte for byte

All of it is made beside the output under a hidden name, flushed, compared with the source, and then
renamed as a whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bitcpm.arch.hf_config import CONFIG_FILE
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import Place
from megatron_bitcpm.checkpoint.model_file import MODEL_FILE, SIDE_FOLDER, ModelFile
from megatron_bitcpm.checkpoint.store import TRACKER
from megatron_bitcpm.conversion.hf.side_files import copy_companions, find_original_config
from megatron_bitcpm.conversion.megatron.folder import RELEASE
from megatron_bitcpm.conversion.megatron.shards import Shards
from megatron_bitcpm.conversion.megatron.stock_args import make_args
from megatron_bitcpm.conversion.output_folder import new_folder
from megatron_bitcpm.conversion.source import ModelSource

Check = Callable[[Path], dict[str, Any]]


def write_megatron(
    shards: Shards,
    model: ModelConfig,
    output: str | Path,
    fill: Callable[[Path], None],
    *,
    overwrite: bool,
    check: Check | None,
) -> dict[str, Any]:
    """Make a checkpoint's folder around the files that `fill` writes into an empty one.

    Args:
        shards: the model, cut.
        model: its architecture as Megatron holds it.
        output: the folder; made if absent.
        overwrite: replace a converted checkpoint that is there.
        check: compares the written checkpoint with the source; raises on a difference.
    Returns:
        folder, files, bytes, padded_vocab_size, layout, write_seconds, verify_seconds, verify (what
        `check` returned).

    Raises:
        CheckpointError: the output exists or cannot be written; an existing one is as it was.
    """
    output, source = Path(os.path.realpath(output)), shards.source
    with new_folder(output, overwrite) as scratch:
        begin = time.perf_counter()
        folder = scratch / RELEASE
        folder.mkdir()
        fill(folder)
        described = _describe(shards, model)
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


def _describe(shards: Shards, model: ModelConfig) -> ModelFile:
    source = shards.source
    return ModelFile(
        form=source.form,
        model=model,
        vocab_size=source.vocab_size,
        padded_vocab_size=shards.rows,
        quantizer=None if source.quantizer is None else source.quantizer.stamp(),
        folding=source.folding,
        facts=source.facts,
        layout=shards.layout.sizes(),
    )


def run_args(
    shards: Shards, model: ModelConfig, ckpt_format: str, transformer_impl: str = "local"
) -> argparse.Namespace:
    """Return the arguments that a run with this model would have saved; see `make_args`."""
    source = shards.source
    projection = [spec for spec in model.family.tensors if spec.role == "projection"][-1]
    return make_args(
        model,
        vocab_size=source.vocab_size,
        padded_vocab_size=shards.rows,
        dtype=source.dtype(Place(projection, 0, 0).name("hf")),
        layout=shards.layout,
        ckpt_format=ckpt_format,
        transformer_impl=transformer_impl,
        seq_length=source.facts.get("seq_length"),
    )
