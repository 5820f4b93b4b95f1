"""Writes a torch_dist checkpoint without Megatron: weights that any layout loads.

One ``.distcp`` file for each rank of the layout, torch's index ``.metadata``, and ``common.pt``
with the arguments that stock `pretrain_gpt.py` takes over. Layers are stacked in dimension 0 as
Megatron stacks them. One tensor is in memory at a time.

The folder is named ``release``: weights alone, for which stock Megatron looks for no optimizer.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_bitcpm.arch.layout import Layout, pad_rows
from megatron_bitcpm.arch.model import ModelConfig, iter_tensors
from megatron_bitcpm.arch.tensors import STACKED_PREFIX
from megatron_bitcpm.checkpoint.safe_load import COMMON_FILE, METADATA_FILE
from megatron_bitcpm.conversion.megatron.output import Check, run_args, write_megatron
from megatron_bitcpm.conversion.megatron.shards import Piece, Shards
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.tensor_stream import FlushedFile, count_bytes, dtype_name
from megatron_bitcpm.conversion.torch_file_writer import LateTensor, write_torch_file
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.progress import track_tensors

_CONFIG = """{"sharded_backend": "torch_dist", "sharded_backend_version": 1, \
"common_backend": "torch", "common_backend_version": 1}"""
_COMMON = {"checkpoint_version": 3.0, "iteration": 0, "num_floating_point_operations_so_far": 0}
_ALIGNMENT = 64


def write_torch_dist(
    source: ModelSource,
    output: str | Path,
    layout: Layout | None = None,
    *,
    overwrite: bool = False,
    check: Check | None = None,
) -> dict[str, Any]:
    """Write a model as a torch_dist checkpoint of Megatron, its tensors as they are.

    Args:
        output: folder that gets ``release`` and the tracker file; made if absent.
        layout: ranks whose files are written; any layout loads them.
        overwrite: replace a converted checkpoint that is there.
        check: called with the written folder before it gets its name; raises on a difference.

    Returns the report of `write_megatron`, whose errors it has, and refuses a layout that does not
    fit.
    """
    layout = layout or Layout()
    # Every tensor rank must hold as many rows; the multiple is recorded with the model.
    multiple = math.lcm(source.model.make_vocab_size_divisible_by, layout.tp)
    model = source.model.model_copy(update={"make_vocab_size_divisible_by": multiple})
    shards = Shards(source, layout, pad_rows(source.vocab_size, multiple))

    def fill(folder: Path) -> None:
        _write_tensors(shards, folder)
        with FlushedFile(folder / COMMON_FILE) as file:
            write_torch_file(file, {**_COMMON, "args": run_args(shards, model, "torch_dist")})
        (folder / "metadata.json").write_text(_CONFIG, encoding="utf-8")

    return write_megatron(shards, model, output, fill, overwrite=overwrite, check=check)


def _write_tensors(shards: Shards, folder: Path) -> None:
    layout, num_layers = shards.layout, shards.source.model.num_layers
    ranks = [(pp_rank, tp_rank) for pp_rank in range(layout.pp) for tp_rank in range(layout.tp)]
    pieces = {
        (pp_rank, tp_rank): [
            piece
            for chunk in range(layout.vpp)
            for piece in shards.pieces(tp_rank, pp_rank, chunk)
            # What all tensor ranks hold alike is written once.
            if tp_rank == 0 or piece.full != piece.tensor.shape
        ]
        for pp_rank, tp_rank in ranks
    }
    sizes = {
        f"{rank}.{number}": count_bytes(piece.tensor.shape, piece.tensor.dtype)
        for rank, rank_pieces in enumerate(pieces.values())
        for number, piece in enumerate(rank_pieces)
    }
    bar, index = track_tensors(sizes, "write"), _Index()
    for rank, rank_pieces in enumerate(pieces.values()):
        name = f"__{rank}_0.distcp"
        with FlushedFile(folder / name) as file:
            for piece, _ in zip(rank_pieces, bar, strict=False):
                index.write(file, name, piece, num_layers)
            if rank == 0:
                index.write_extra_states(file, name, shards.source.model)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(index.metadata(), protocol=4))


class _Index:
    """Collects torch's index while the pieces are written."""

    def __init__(self) -> None:
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def write_extra_states(self, file: FlushedFile, file_name: str, model: ModelConfig) -> None:
        """Write the empty states that Megatron's linears ask for (of FP8, in other models)."""
        for spec, layer in iter_tensors(model):
            if spec.role != "projection":
                continue
            name = f"{STACKED_PREFIX}{spec.module}._extra_state/shard_{layer}_{model.num_layers}"
            self._entries[name] = BytesStorageMetadata()
            self._places[MetadataIndex(name)] = _append(file, file_name, [None])

    def write(self, file: FlushedFile, file_name: str, piece: Piece, num_layers: int) -> None:
        tensor = piece.tensor
        name, full, start = piece.spec.name, piece.full, piece.start
        if piece.layer is not None:
            name, full = STACKED_PREFIX + name, (num_layers, *full)
            start = (piece.layer, *start)
            tensor = LateTensor(
                (1, *tensor.shape), tensor.dtype, lambda: piece.tensor.read().unsqueeze(0)
            )
        info = _append(file, file_name, tensor)
        entry = self._entries.setdefault(
            name,
            TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(full), []),
        )
        assert isinstance(entry, TensorStorageMetadata), name
        _check_dtype(name, entry.properties.dtype, tensor.dtype)
        chunk = ChunkStorageMetadata(torch.Size(start), torch.Size(tensor.shape))
        place = MetadataIndex(name, chunk.offsets, len(entry.chunks))
        entry.chunks.append(chunk)
        self._places[place] = info

    def metadata(self) -> Metadata:
        return Metadata(
            state_dict_metadata=dict(self._entries),
            planner_data={name: (name,) for name in self._entries},
            storage_data=self._places,
        )


def _append(file: FlushedFile, file_name: str, content: Any) -> _StorageInfo:
    # The records inside are aligned to the beginning of their archive.
    file.write(bytes(-file.tell() % _ALIGNMENT))
    offset = file.tell()
    return _StorageInfo(file_name, offset, write_torch_file(file, content))


def _check_dtype(name: str, found: torch.dtype, wanted: torch.dtype) -> None:
    if found != wanted:
        raise CheckpointError(
            f"checkpoint={name}: is {dtype_name(found)} in one layer and {dtype_name(wanted)} "
            "in another, which Megatron, stacking the layers, cannot hold. Convert the folder to "
            "one type first."
        )
