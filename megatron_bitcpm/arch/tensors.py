"""THE MAP: every tensor of a model, written once.

    Megatron (fused)                              Hugging Face
    embedding.word_embeddings.weight              model.embed_tokens.weight    without padding rows
    self_attention.linear_qkv.layer_norm_weight   input_layernorm.weight
    self_attention.linear_qkv.weight              self_attn.{q,k,v}_proj.weight
    self_attention.linear_proj.weight             self_attn.o_proj.weight
    mlp.linear_fc1.layer_norm_weight              post_attention_layernorm.weight
    mlp.linear_fc1.weight                         mlp.{gate,up}_proj.weight
    mlp.linear_fc2.weight                         mlp.down_proj.weight
    decoder.final_layernorm.weight                model.norm.weight
    output_layer.weight                           lm_head.weight               absent when tied

A row says what a tensor is (its role), its names, its shape in the dimensions of a model, how the
rows of a fused weight lie, and which dimension tensor parallelism cuts. Counts, FLOPs,
`ternarize_`, initial weights, shards, readers, writers and inspect all read it here: another tensor
is another row, another format's names are another key of `Part.names` and of `LAYER_PREFIXES`,
another family another entry of `FAMILIES`.

Fused rows lie in runs. Of linear_fc1 these are all of gate, then all of up, and each rank of tensor
parallelism holds its share of each. Those of linear_qkv are interleaved by query group (its query
heads, its key head, its value head), and ranks hold consecutive rows, also where that cuts a group.
Only rows move, and quantisation groups run along the inputs, so a group is never cut.

Shape legend: O out, I in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
LAYER_PREFIXES = {"megatron": "decoder.layers.{}.", "hf": "model.layers.{}."}
"""Format -> what precedes the name of a layer's tensor."""
STACKED_PREFIX = LAYER_PREFIXES["megatron"].replace("{}.", "")
"""What precedes it where Megatron stacks the layers in dimension 0."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shapes are made of; `groups` are key/value heads, `vocab` embedding rows."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int = 1

    @property
    def queries(self) -> int:
        """Rows of q."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Rows of k, and of v."""
        return self.groups * self.head_dim

    def size(self, name: str) -> int:
        """Return a dimension by its name in the table."""
        size: int = getattr(self, name)
        return size


@dataclass(frozen=True)
class Part:
    """What formats that do not fuse store as a tensor of its own: dimension of its rows, names.

    `names` has format -> name; that of a layer's tensor without `LAYER_PREFIXES`.
    """

    rows: str
    names: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a fused weight that are consecutive rows of one part."""

    part: int
    first: int
    count: int


@dataclass(frozen=True)
class TensorSpec:
    """One row of the map.

    Attributes:
        role: embedding, norm, projection (ternarised, of a layer) or output.
        name: Megatron's; of a layer's tensor below ``decoder.layers.N``.
        parts: what it is fused of; one part where nothing is fused.
        inputs: dimension of the inputs; None for a vector.
        sharded: what tensor parallelism cuts; None where every rank holds all of it.
        in_layer: whether each layer has one.
        interleaved: rows lie by query group rather than part after part.
        local_name: where Megatron's own modules, without Transformer Engine, name it otherwise.
    """

    role: str
    name: str
    parts: tuple[Part, ...]
    inputs: str | None = None
    sharded: Literal["rows", "inputs"] | None = None
    in_layer: bool = True
    interleaved: bool = False
    local_name: str | None = None

    @property
    def module(self) -> str:
        """Name of the module that holds it, as filters of the quantiser see it in a layer."""
        return self.name.removesuffix(".weight")

    @property
    def hf(self) -> str:
        """The Hugging Face name of a tensor outside the layers."""
        return self.parts[0].names["hf"]

    @property
    def row_parallel(self) -> bool:
        """Whether tensor parallelism cuts the inputs."""
        return self.sharded == "inputs"

    @property
    def writes_residual(self) -> bool:
        """Whether its output is added to the residual stream."""
        return self.role == "projection" and self.parts[0].rows == "hidden"

    def part_shape(self, part: int, dims: Dimensions) -> Shape:
        """Return the shape of one part, [O, I] or [O]."""
        rows = dims.size(self.parts[part].rows)
        return (rows,) if self.inputs is None else (rows, dims.size(self.inputs))

    def shape(self, dims: Dimensions) -> Shape:
        """Return the full shape of Megatron's tensor."""
        shapes = [self.part_shape(part, dims) for part in range(len(self.parts))]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def runs(self, dims: Dimensions) -> list[Run]:
        """Return the runs of the fused rows, in order."""
        counts = [dims.size(part.rows) for part in self.parts]
        if not self.interleaved:
            return [Run(part, 0, count) for part, count in enumerate(counts)]
        shares = [count // dims.groups for count in counts]
        return [
            Run(part, group * share, share)
            for group in range(dims.groups)
            for part, share in enumerate(shares)
        ]

    def rank_rows(self, dims: Dimensions, tp_size: int, tp_rank: int) -> list[range]:
        """Return the ranges of full rows that a tensor-parallel rank holds, in its order."""
        rows = self.shape(dims)[0]
        if self.sharded != "rows":
            return [range(rows)]
        ranges, start = [], 0
        for length in [rows] if self.interleaved else [run.count for run in self.runs(dims)]:
            share = length // tp_size
            ranges.append(range(start + tp_rank * share, start + (tp_rank + 1) * share))
            start += length
        return ranges

    def split(self, fused: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
        """Split a fused weight, or a value for each of its rows, [O, ...], into its parts."""
        pieces: list[list[torch.Tensor]] = [[] for _ in self.parts]
        start = 0
        for run in self.runs(dims):
            pieces[run.part].append(fused[start : start + run.count])
            start += run.count
        return tuple(_join_rows(part) for part in pieces)

    def read_rows(
        self, read: Callable[[int], torch.Tensor], dims: Dimensions, rows: range
    ) -> torch.Tensor:
        """Return consecutive rows of the fused weight, [rows, I], a view where one part has them.

        `read` returns a part by its number; `rows` are numbers of full rows.
        """
        pieces, begin, parts = [], 0, {}
        for run in self.runs(dims):
            low, high = max(rows.start, begin), min(rows.stop, begin + run.count)
            if low < high:
                if run.part not in parts:
                    parts[run.part] = read(run.part)
                first = run.first + low - begin
                pieces.append(parts[run.part][first : first + high - low])
            begin += run.count
        return _join_rows(pieces)

    def join_ranks(self, shards: Sequence[torch.Tensor], dims: Dimensions) -> torch.Tensor:
        """Put the parts of all tensor-parallel ranks together, [O, I]; of rows also values, [O]."""
        if len(shards) == 1 or self.sharded is None:
            return shards[0]
        full = shards[0].new_empty(self.shape(dims)[: shards[0].ndim])
        start = 0
        for rank, shard in enumerate(shards):
            if self.row_parallel:
                full[:, start : start + shard.shape[1]] = shard
                start += shard.shape[1]
                continue
            begin = 0
            for rows in self.rank_rows(dims, len(shards), rank):
                full[rows.start : rows.stop] = shard[begin : begin + len(rows)]
                begin += len(rows)
        return full


def _join_rows(pieces: list[torch.Tensor]) -> torch.Tensor:
    if len(pieces) == 1:
        return pieces[0]
    joined = pieces[0].new_empty(sum(map(len, pieces)), *pieces[0].shape[1:])
    start = 0
    for piece in pieces:
        joined[start : start + len(piece)] = piece
        start += len(piece)
    return joined


def _part(rows: str, hf: str, **names: str) -> Part:
    return Part(rows, {"hf": hf, **names})


EMBEDDING = TensorSpec(
    "embedding",
    "embedding.word_embeddings.weight",
    (_part("vocab", "model.embed_tokens.weight"),),
    "hidden",
    "rows",
    in_layer=False,
)
OUTPUT = TensorSpec(
    "output",
    "output_layer.weight",
    (_part("vocab", "lm_head.weight"),),
    "hidden",
    "rows",
    in_layer=False,
)
LLAMA = (
    EMBEDDING,
    TensorSpec(
        "norm",
        "self_attention.linear_qkv.layer_norm_weight",
        (_part("hidden", "input_layernorm.weight"),),
        local_name="input_layernorm.weight",
    ),
    TensorSpec(
        "projection",
        "self_attention.linear_qkv.weight",
        (
            _part("queries", "self_attn.q_proj.weight"),
            _part("keys", "self_attn.k_proj.weight"),
            _part("keys", "self_attn.v_proj.weight"),
        ),
        "hidden",
        "rows",
        interleaved=True,
    ),
    TensorSpec(
        "projection",
        "self_attention.linear_proj.weight",
        (_part("hidden", "self_attn.o_proj.weight"),),
        "queries",
        "inputs",
    ),
    TensorSpec(
        "norm",
        "mlp.linear_fc1.layer_norm_weight",
        (_part("hidden", "post_attention_layernorm.weight"),),
        local_name="pre_mlp_layernorm.weight",
    ),
    TensorSpec(
        "projection",
        "mlp.linear_fc1.weight",
        (_part("ffn", "mlp.gate_proj.weight"), _part("ffn", "mlp.up_proj.weight")),
        "hidden",
        "rows",
    ),
    TensorSpec(
        "projection",
        "mlp.linear_fc2.weight",
        (_part("hidden", "mlp.down_proj.weight"),),
        "ffn",
        "inputs",
    ),
    TensorSpec(
        "norm",
        "decoder.final_layernorm.weight",
        (_part("hidden", "model.norm.weight"),),
        in_layer=False,
    ),
    OUTPUT,
)


@dataclass(frozen=True)
class Family:
    """A kind of model: its rows of the map, in the order of the forward pass, and its classes.

    `tied_by_default` is what an absent tie_word_embeddings means; `constants` are further fields of
    `ModelConfig` that it needs, keys of config.json too.
    """

    title: str
    tensors: tuple[TensorSpec, ...]
    hf_class: str
    tied_by_default: bool = False
    constants: tuple[str, ...] = field(default=())


FAMILIES = {
    "llama": Family("Llama", LLAMA, "LlamaForCausalLM"),
    # Tied by default in OpenBMB's configuration class.
    "minicpm": Family(
        "MiniCPM",
        LLAMA,
        "MiniCPMForCausalLM",
        tied_by_default=True,
        constants=("scale_emb", "scale_depth", "dim_model_base"),
    ),
}


@dataclass(frozen=True)
class Place:
    """Which tensor of a model a name means.

    `part` counts those of `spec`, in a format that does not fuse; `layer` is the global number,
    from 0, None outside the layers.
    """

    spec: TensorSpec
    part: int
    layer: int | None

    @property
    def megatron(self) -> str:
        """Megatron's name, the layer numbered."""
        return name_of(self.spec, self.layer)

    @property
    def module(self) -> str:
        """Global name of Megatron's module, as the quantiser's filters see it."""
        return self.megatron.removesuffix(".weight")

    @property
    def local_hf(self) -> str:
        """Hugging Face's name below the layer, without ``.weight``."""
        return self.spec.parts[self.part].names["hf"].removesuffix(".weight")

    def name(self, format: str) -> str:
        """Return the name of this part in a format that does not fuse."""
        return layer_prefix(self.layer, format) + self.spec.parts[self.part].names[format]

    def shape(self, dims: Dimensions) -> Shape:
        """Return the shape of this part."""
        return self.spec.part_shape(self.part, dims)


def layer_prefix(layer: int | None, format: str = "megatron") -> str:
    """Return what precedes the name of a tensor, '' outside the layers."""
    return "" if layer is None else LAYER_PREFIXES[format].format(layer)


def split_layer(name: str, format: str = "megatron") -> tuple[int | None, str]:
    """Return the number of the layer in a name, None outside the layers, and the rest."""
    prefix, suffix = map(re.escape, LAYER_PREFIXES[format].split("{}"))
    # Python makes no number of more digits.
    match = re.fullmatch(rf"{prefix}(\d{{1,4000}}){suffix}(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def name_of(spec: TensorSpec, layer: int | None) -> str:
    """Return Megatron's name of a tensor; `layer` is its global number, None outside the layers."""
    return layer_prefix(layer) + spec.name


def all_specs() -> tuple[TensorSpec, ...]:
    """Return the rows of all families."""
    return tuple({s.name: s for family in FAMILIES.values() for s in family.tensors}.values())


def find_tensor(name: str, format: str = "hf") -> Place | None:
    """Return which tensor a name of a format means, None where it is unknown.

    Formats are keys of `LAYER_PREFIXES`; for megatron the part is 0.
    """
    layer, name = split_layer(name, format)
    for spec in all_specs():
        if spec.in_layer != (layer is not None):
            continue
        if format == "megatron":
            if name in (spec.name, spec.local_name):
                return Place(spec, 0, layer)
            continue
        for number, part in enumerate(spec.parts):
            if part.names.get(format) == name:
                return Place(spec, number, layer)
    return None


def find_projection(name: str, format: str = "hf") -> Place | None:
    """Return which projection of a layer a tensor is, None for all others."""
    place = find_tensor(name, format)
    return place if place is not None and place.spec.role == "projection" else None


def iter_specs(
    tensors: Sequence[TensorSpec], layers: Sequence[int], tied: bool
) -> Iterator[tuple[TensorSpec, int | None]]:
    """Yield (row, layer) of every tensor of a model, in the order of the forward pass.

    `tensors` has what comes before the layers, one layer, and what comes behind them.
    """
    inside = [number for number, spec in enumerate(tensors) if spec.in_layer]
    for spec in tensors[: inside[0]]:
        yield spec, None
    for layer in layers:
        for number in inside:
            yield tensors[number], layer
    for spec in tensors[inside[-1] + 1 :]:
        if not (tied and spec.role == "output"):
            yield spec, None


def count_values(shapes: Mapping[Any, Shape]) -> int:
    """Return how many values tensors of these shapes have."""
    return sum(math.prod(shape) for shape in shapes.values())
