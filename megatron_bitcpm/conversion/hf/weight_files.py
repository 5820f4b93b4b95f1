"""The weight files of a Hugging Face folder, written tensor by tensor, and their index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.model import Form
from megatron_bitcpm.conversion.hf.source import WEIGHT_KINDS
from megatron_bitcpm.conversion.hf.tensor_writers import Entries, write_bin, write_safetensors
from megatron_bitcpm.conversion.quantization_error import check_finite
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.tensor_stream import count_bytes, cut_shards, read_ahead
from megatron_bitcpm.files import write_json
from megatron_bitcpm.progress import track_tensors

_WRITERS = {"safetensors": write_safetensors, "bin": write_bin}


def write_weight_files(
    folder: Path, source: ModelSource, form: Form, weights: str, max_shard_bytes: int
) -> tuple[list[str], int]:
    """Write the weight files, and their index where there are several.

    Latent writes the stored tensors, pseudo and plain what the forward multiplies with.

    Returns:
        Names of the files, and bytes of the tensors.

    Raises:
        CheckpointError: a damaged source, or a value that is not finite.
        OSError: a file cannot be written; a part of it is left.
    """
    single, index_name, _ = WEIGHT_KINDS[weights]
    layout: Entries = {name: (shape, source.dtype(name)) for name, shape in source.shapes().items()}
    sizes = {name: count_bytes(*entry) for name, entry in layout.items()}
    shards = cut_shards(sizes, max_shard_bytes)
    stem, _, suffix = single.partition(".")
    files = [single]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        files = [f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in numbers]
    with closing(read_ahead(_iter_tensors(source, form, sizes))) as tensors:
        for file, names in zip(files, shards, strict=True):
            part = {name: layout[name] for name in names}
            _WRITERS[weights](folder / file, part, _take(tensors, len(names)))
    if len(shards) > 1:
        pairs = zip(files, shards, strict=True)
        weight_map = {name: file for file, names in pairs for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / index_name, index)
    return files, sum(sizes.values())


def _take(tensors: Iterator[tuple[str, torch.Tensor]], count: int) -> Iterator[Any]:
    # Not `islice`, which keeps its last item.
    for _ in range(count):
        yield next(tensors)


def _iter_tensors(
    source: ModelSource, form: Form, sizes: Mapping[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in track_tensors(sizes, "write"):
        tensor = source.tensor(name) if form == "latent" else source.forward_tensor(name)
        check_finite(name, tensor, f"checkpoint={source.path}")
        yield name, tensor
        del tensor
