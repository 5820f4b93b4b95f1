"""How a model is cut into the shards of Megatron's ranks, and the values of each piece.

A `Piece` is a box of one of Megatron's full tensors, read from a `ModelSource` when it is written:
no fused weight is ever made as a whole where a rank holds a part. Where it begins, and which rows
of which Hugging Face tensors it has, follows from the map (`arch.tensors`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.arch.model import iter_tensors
from megatron_bitcpm.arch.tensors import EMBEDDING, OUTPUT, Place, Shape, TensorSpec
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.tensor_stream import dtype_name
from megatron_bitcpm.conversion.torch_file_writer import LateTensor
from megatron_bitcpm.errors import CheckpointError

_OPTIONS = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "vpp": "virtual_pipeline_parallel_size",
}


@dataclass(frozen=True)
class Piece:
    """A box of a full tensor, which begins at `start`; `layer` is global, None outside."""

    spec: TensorSpec
    layer: int | None
    full: Shape
    start: Shape
    tensor: LateTensor


class Shards:
    """The pieces of every rank of a layout; `rows` of the embedding are with its padding.

    Raises:
        CheckpointError: the layout does not fit.
    """

    def __init__(self, source: ModelSource, layout: Layout, rows: int) -> None:
        for axis, rule in layout.problems(source.model, rows):
            fix = layout.suggest(axis, source.model, rows)
            raise CheckpointError(f"{_OPTIONS[axis]}={getattr(layout, axis)}: {rule}. {fix}.")
        self.source, self.layout, self.rows = source, layout, rows
        self._dims = source.model.dimensions(rows)

    def pieces(self, tp_rank: int, pp_rank: int, chunk: int) -> Iterator[Piece]:
        """Yield what one chunk of a rank holds, in the order of the model.

        What no dimension cuts is on all tensor ranks. A tied output layer is not yielded, see
        `tied_output`.
        """
        inside = False
        layers = self.layout.layers(self.source.model, pp_rank, chunk)
        for spec, layer in iter_tensors(self.source.model, layers):
            inside = inside or layer is not None
            is_held = self._is_last(pp_rank, chunk) if inside else pp_rank == chunk == 0
            if layer is not None or is_held:
                yield from self._cut(spec, layer, tp_rank)

    def tied_output(self, tp_rank: int, pp_rank: int, chunk: int) -> Piece | None:
        """Return the copy of a tied embedding that the last stage holds, where there is one."""
        tied = self.source.model.share_embeddings_and_output_weights
        if not (tied and self.layout.pp > 1 and self._is_last(pp_rank, chunk)):
            return None
        piece = next(self._cut(EMBEDDING, None, tp_rank))
        return Piece(OUTPUT, None, piece.full, piece.start, piece.tensor)

    def _is_last(self, pp_rank: int, chunk: int) -> bool:
        return pp_rank == self.layout.pp - 1 and chunk == self.layout.vpp - 1

    def _cut(self, spec: TensorSpec, layer: int | None, tp_rank: int) -> Iterator[Piece]:
        """Yield the boxes of a tensor that a tensor-parallel rank holds."""
        full, tp = spec.shape(self._dims), self.layout.tp
        names = [Place(spec, part, layer).name("hf") for part in range(len(spec.parts))]
        dtype = _common_dtype(self.source, names)
        width = full[-1] // tp if spec.row_parallel else full[-1]
        first = tp_rank * width if spec.row_parallel else 0

        def late(rows: range) -> LateTensor:
            def read() -> torch.Tensor:
                if spec in (EMBEDDING, OUTPUT):
                    return self._read_vocabulary(names[0], rows)
                box = spec.read_rows(lambda part: self.source.tensor(names[part]), self._dims, rows)
                return box[:, first : first + width] if spec.row_parallel else box

            return LateTensor((len(rows), *((width,) if len(full) > 1 else ())), dtype, read)

        for rows in spec.rank_rows(self._dims, tp, tp_rank):
            start = (rows.start, first) if len(full) > 1 else (rows.start,)
            yield Piece(spec, layer, full, start, late(rows))

    def _read_vocabulary(self, name: str, rows: range) -> torch.Tensor:
        table = self.source.padded_tensor(name)
        if table.shape[0] != self.rows:
            # New rows are copies of the last one, as Megatron's own converter makes them.
            table = table[: self.source.vocab_size]
        found = table[rows.start : rows.stop]
        missing = len(rows) - len(found)
        return torch.cat([found, table[-1:].expand(missing, -1)]) if missing else found


def _common_dtype(source: ModelSource, names: list[str]) -> torch.dtype:
    """One weight of Megatron has one type: that of its projections."""
    dtypes = {name: source.dtype(name) for name in names}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in dtypes.items())
        raise CheckpointError(
            f"checkpoint={source.path}: projections that Megatron fuses differ in type: {listed}. "
            "Convert the folder to one type first."
        )
    return dtypes[names[0]]
