"""Writes legacy ``mp_rank_*`` shards: the format of megatron-core 0.12.1 and MindSpeed-LLM.

Each rank has a pickle with its part of the model, as ``model`` or, with virtual pipeline stages,
``model0``, ``model1``, ..., and with the arguments of the run that their loaders check. The folder
is named ``release``, for which they look for no optimizer.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.layout import Layout, pad_rows
from megatron_bitcpm.arch.tensors import layer_prefix
from megatron_bitcpm.conversion.megatron.folder import SHARD_FILE
from megatron_bitcpm.conversion.megatron.output import Check, run_args, write_megatron
from megatron_bitcpm.conversion.megatron.shards import Piece, Shards
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.tensor_stream import FlushedFile, count_bytes
from megatron_bitcpm.conversion.torch_file_writer import LateTensor, write_torch_file
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.progress import track_tensors


def write_legacy(
    source: ModelSource,
    output: str | Path,
    layout: Layout | None = None,
    *,
    overwrite: bool = False,
    check: Check | None = None,
    transformer_impl: str = "local",
) -> dict[str, Any]:
    """Write a model as legacy shards; arguments and report as of `write_torch_dist`.

    Only the ranks of `layout` load them. `transformer_impl` of the run that will do so decides the
    names of the layers' norms.
    """
    layout, model = layout or Layout(), source.model
    if model.num_query_groups % layout.tp:
        raise CheckpointError(
            f"tensor_parallel_size={layout.tp}: {model.num_query_groups} key/value heads cannot be "
            "shared out, which megatron-core 0.12.1, the reader of this format, needs. Use a size "
            f"that divides {model.num_query_groups}, or --format torch_dist."
        )
    # Megatron's own rule for the padding.
    rows = pad_rows(source.vocab_size, model.make_vocab_size_divisible_by * layout.tp)
    shards = Shards(source, layout, rows)

    def fill(folder: Path) -> None:
        _write_shards(shards, folder, run_args(shards, model, "torch", transformer_impl))

    return write_megatron(shards, model, output, fill, overwrite=overwrite, check=check)


def _write_shards(shards: Shards, folder: Path, args: argparse.Namespace) -> None:
    layout, local = shards.layout, args.transformer_impl == "local"
    chunks = {
        (pp_rank, tp_rank, chunk): _chunk_tensors(shards, tp_rank, pp_rank, chunk, local)
        for pp_rank in range(layout.pp)
        for tp_rank in range(layout.tp)
        for chunk in range(layout.vpp)
    }
    sizes = {
        f"{place}.{name}": count_bytes(late.shape, late.dtype)
        for place, tensors in chunks.items()
        for name, late in tensors.items()
    }
    bar = track_tensors(sizes, "write")
    for pp_rank in range(layout.pp):
        for tp_rank in range(layout.tp):
            models = [chunks[pp_rank, tp_rank, chunk] for chunk in range(layout.vpp)]
            content: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
            for chunk, tensors in enumerate(models):
                key = "model" if layout.vpp == 1 else f"model{chunk}"
                content[key] = OrderedDict(
                    (name, _counted(late, bar)) for name, late in tensors.items()
                )
            name = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if layout.pp > 1 else "")
            (folder / name).mkdir()
            with FlushedFile(folder / name / SHARD_FILE) as file:
                write_torch_file(file, content)
    # The bar counts a tensor when the next one is asked for.
    next(bar, None)


def _counted(late: LateTensor, bar: Any) -> LateTensor:
    def read() -> torch.Tensor:
        next(bar, None)
        return late.read()

    return LateTensor(late.shape, late.dtype, read)


def _chunk_tensors(
    shards: Shards, tp_rank: int, pp_rank: int, chunk: int, local: bool
) -> dict[str, LateTensor]:
    """Return a chunk's tensors under the names of its module."""
    layers = shards.layout.layers(shards.source.model, pp_rank, chunk)
    parts: dict[str, list[Piece]] = {}
    for piece in shards.pieces(tp_rank, pp_rank, chunk):
        name = (piece.spec.local_name if local else None) or piece.spec.name
        if piece.layer is not None:
            name = layer_prefix(piece.layer - layers.start) + name
        parts.setdefault(name, []).append(piece)
    tensors = {name: _join(pieces) for name, pieces in parts.items()}
    output = shards.tied_output(tp_rank, pp_rank, chunk)
    return tensors if output is None else {**tensors, output.spec.name: output.tensor}


def _join(pieces: list[Piece]) -> LateTensor:
    """Put a rank's parts of gate and up one below the other."""
    if len(pieces) == 1:
        return pieces[0].tensor
    shape = (sum(piece.tensor.shape[0] for piece in pieces), *pieces[0].tensor.shape[1:])
    return LateTensor(
        shape,
        pieces[0].tensor.dtype,
        lambda: torch.cat([piece.tensor.read() for piece in pieces]),
    )
