"""How a model is cut into the shards of Megatron's ranks, and the values of each piece.

A `Piece` is a box of one of Megatron's full tensors, read from a `ModelSource` when it is written:
no fused weight is ever made as a whole where a rank holds a part. Column-parallel weights and the
vocabulary are cut along their rows, row-parallel ones along their inputs. The rows of linear_qkv
are interleaved by query group and then simply cut, also where ranks share a group; of linear_fc1
each rank holds its part of gate and of up.

Shape legend: O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.conversion.names import (
    EMBEDDING,
    FINAL_NORM,
    HF_EMBEDDING,
    HF_FINAL_NORM,
    HF_OUTPUT,
    LAYER_NORMS,
    LINEARS,
    OUTPUT,
    FusedLinear,
)
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.torch_file_writer import LateTensor
from megatron_bitcpm.errors import CheckpointError


@dataclass(frozen=True)
class MegatronLayout:
    """Sizes of tensor, pipeline and virtual pipeline parallelism.

    Attributes:
        tp: ranks that share each layer.
        pp: stages of consecutive layers.
        vpp: chunks of layers on each stage; None is 1.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = 1

    def __post_init__(self) -> None:
        """Refuse a size below 1.

        Raises:
            CheckpointError: names it.
        """
        for name, size in (("tensor", self.tp), ("pipeline", self.pp), ("virtual", self.chunks)):
            if size < 1:
                raise _layout_error(name, size, "must be at least 1", "Use 1 or more")

    @property
    def chunks(self) -> int:
        """Chunks of layers on each stage."""
        return 1 if self.vpp is None else self.vpp

    def check(self, model: ModelConfig, padded_vocab_size: int) -> None:
        """Refuse a layout that Megatron could not hold the model in.

        Raises:
            CheckpointError: names the size and the number that it does not divide.
        """
        if self.chunks > 1 and self.pp == 1:
            raise _layout_error(
                "virtual", self.chunks, "has no effect with pipeline size 1", "Leave it out"
            )
        for name, value in (
            ("num_attention_heads", model.num_attention_heads),
            ("ffn_hidden_size", model.ffn_hidden_size),
            ("padded vocabulary", padded_vocab_size),
        ):
            if value % self.tp:
                raise _layout_error(
                    "tensor", self.tp, f"does not divide {name} {value}", "Use another size"
                )
        groups = model.num_query_groups
        if groups % self.tp and self.tp % groups:
            raise _layout_error(
                "tensor",
                self.tp,
                f"neither divides nor is a multiple of {groups} key/value heads",
                "Use another size",
            )
        pieces = self.pp * self.chunks
        if model.num_layers % pieces:
            name, size = ("virtual", self.chunks) if self.chunks > 1 else ("pipeline", self.pp)
            raise _layout_error(
                name,
                size,
                f"{model.num_layers} layers cannot be cut into {pieces} equal pieces",
                "Use sizes whose product divides the layers",
            )

    def layers(self, model: ModelConfig, pp_rank: int, chunk: int) -> range:
        """Return the global numbers of a chunk's layers; chunks go round the stages."""
        count = model.num_layers // (self.pp * self.chunks)
        first = (chunk * self.pp + pp_rank) * count
        return range(first, first + count)

    def to_json(self) -> dict[str, int]:
        """Return the sizes for ``bitcpm_model.json``."""
        return {"tp": self.tp, "pp": self.pp, "vpp": self.chunks}


_OPTIONS = {
    "tensor": "tensor_parallel_size",
    "pipeline": "pipeline_parallel_size",
    "virtual": "virtual_pipeline_parallel_size",
}


def _layout_error(name: str, size: int, rule: str, fix: str) -> CheckpointError:
    return CheckpointError(f"{_OPTIONS[name]}={size}: {rule}. {fix}.")


@dataclass(frozen=True)
class Piece:
    """A box of a full tensor.

    Attributes:
        name: Megatron's; of a layer's tensor below ``decoder.layers.N``.
        layer: global layer number, None outside the layers.
        full: shape of the full tensor.
        start: where the box begins in it.
        tensor: its values.
    """

    name: str
    layer: int | None
    full: tuple[int, ...]
    start: tuple[int, ...]
    tensor: LateTensor


class Shards:
    """The pieces of every rank.

    Args:
        source: the model.
        layout: how it is cut; checked.
        rows: of the embedding, with its padding.

    Raises:
        CheckpointError: the layout does not fit.
    """

    def __init__(self, source: ModelSource, layout: MegatronLayout, rows: int) -> None:
        layout.check(source.model, rows)
        self.source, self.layout, self.rows = source, layout, rows

    def pieces(self, tp_rank: int, pp_rank: int, chunk: int) -> Iterator[Piece]:
        """Yield what one chunk of a rank holds, in the order of the model.

        Norms are on all tensor ranks. A tied output layer is not yielded, see `tied_output`.
        """
        if pp_rank == 0 and chunk == 0:
            yield self._vocabulary(EMBEDDING, HF_EMBEDDING, tp_rank)
        for layer in self.layout.layers(self.source.model, pp_rank, chunk):
            for norm, linear in zip(LAYER_NORMS.items(), (LINEARS[:2], LINEARS[2:]), strict=True):
                yield self._norm(norm[0], f"model.layers.{layer}.{norm[1]}", layer)
                for fused in linear:
                    yield from self._linear(fused, layer, tp_rank)
        if self._is_last(pp_rank, chunk):
            yield self._norm(FINAL_NORM, HF_FINAL_NORM, None)
            if not self.source.model.share_embeddings_and_output_weights:
                yield self._vocabulary(OUTPUT, HF_OUTPUT, tp_rank)

    def tied_output(self, tp_rank: int, pp_rank: int, chunk: int) -> Piece | None:
        """Return the copy of a tied embedding that the last stage holds, where there is one."""
        tied = self.source.model.share_embeddings_and_output_weights
        if not (tied and self.layout.pp > 1 and self._is_last(pp_rank, chunk)):
            return None
        return self._vocabulary(OUTPUT, HF_EMBEDDING, tp_rank)

    def _is_last(self, pp_rank: int, chunk: int) -> bool:
        return pp_rank == self.layout.pp - 1 and chunk == self.layout.chunks - 1

    def _norm(self, name: str, hf_name: str, layer: int | None) -> Piece:
        shape = (self.source.model.hidden_size,)
        late = LateTensor(shape, self.source.dtype(hf_name), lambda: self.source.tensor(hf_name))
        return Piece(name, layer, shape, (0,), late)

    def _vocabulary(self, name: str, hf_name: str, tp_rank: int) -> Piece:
        hidden, count = self.source.model.hidden_size, self.rows // self.layout.tp
        first = tp_rank * count

        def read() -> torch.Tensor:
            table = self.source.padded_tensor(hf_name)
            if table.shape[0] != self.rows:
                # New rows are copies of the last one, as Megatron's own converter makes them.
                table = table[: self.source.vocab_size]
            found = table[first : first + count]
            missing = count - found.shape[0]
            return torch.cat([found, table[-1:].expand(missing, -1)]) if missing else found

        late = LateTensor((count, hidden), self.source.dtype(hf_name), read)
        return Piece(name, None, (self.rows, hidden), (first, 0), late)

    def _linear(self, linear: FusedLinear, layer: int, tp_rank: int) -> Iterator[Piece]:
        model, tp = self.source.model, self.layout.tp
        out_features, in_features = linear.shape(model)
        names = [f"model.layers.{layer}.{name}.weight" for name in linear.hf_names]
        dtype = _common_dtype(self.source, names)
        name = f"{linear.name}.weight"

        def piece(start: tuple[int, int], shape: tuple[int, int], late: LateTensor) -> Piece:
            assert late.shape == shape
            return Piece(name, layer, (out_features, in_features), start, late)

        if linear.row_parallel:
            width = in_features // tp
            first = tp_rank * width
            late = LateTensor(
                (out_features, width),
                dtype,
                lambda: self.source.tensor(names[0])[:, first : first + width],
            )
            yield piece((0, first), (out_features, width), late)
        elif len(names) == 2:
            half = model.ffn_hidden_size
            count = half // tp
            for index, hf_name in enumerate(names):
                yield piece(
                    (index * half + tp_rank * count, 0),
                    (count, in_features),
                    LateTensor(
                        (count, in_features), dtype, _rows(self.source, hf_name, tp_rank, count)
                    ),
                )
        else:
            count = out_features // tp
            first = tp_rank * count
            late = LateTensor(
                (count, in_features),
                dtype,
                lambda: read_query_rows(self.source, names, first, first + count),
            )
            yield piece((first, 0), (count, in_features), late)


def _rows(source: ModelSource, hf_name: str, rank: int, count: int) -> Callable[[], torch.Tensor]:
    return lambda: source.tensor(hf_name)[rank * count : (rank + 1) * count]


def _common_dtype(source: ModelSource, names: list[str]) -> torch.dtype:
    """One weight of Megatron has one type: that of its projections."""
    dtypes = {name: source.dtype(name) for name in names}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {str(dtype)[6:]}" for name, dtype in dtypes.items())
        raise CheckpointError(
            f"checkpoint={source.path}: projections that Megatron fuses differ in type: {listed}. "
            "Convert the folder to one type first."
        )
    return dtypes[names[0]]


def read_query_rows(source: ModelSource, names: list[str], first: int, last: int) -> torch.Tensor:
    """Read some rows of a linear_qkv, [last - first, I].

    Args:
        source: the model.
        names: of q_proj, k_proj and v_proj.
        first, last: row numbers in Megatron's order: by group its query heads, key and value head.
    """
    model = source.model
    query, key, value = (source.tensor(name) for name in names)
    head, heads = model.head_dim, model.num_attention_heads // model.num_query_groups
    result = query.new_empty(last - first, query.shape[1])
    for group in range(model.num_query_groups):
        start = group * (heads + 2) * head
        for part, begin, count, source_row in (
            (query, start, heads * head, group * heads * head),
            (key, start + heads * head, head, group * head),
            (value, start + (heads + 1) * head, head, group * head),
        ):
            low, high = max(first, begin), min(last, begin + count)
            if low < high:
                rows = part[source_row + low - begin : source_row + high - begin]
                result[low - first : high - first] = rows
    return result


def pad_rows(vocab_size: int, multiple: int) -> int:
    """Return the rows of an embedding that is padded to a multiple."""
    return math.ceil(vocab_size / multiple) * multiple
