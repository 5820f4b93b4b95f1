"""The table from Megatron to Hugging Face for Llama, with or without quantisation.

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

The rows of linear_qkv are interleaved by query group: its query heads, its key head, its value
head. Those of linear_fc1 are all of gate, then all of up. Only rows move, and groups run along the
inputs, so a fused weight is quantised whole and split afterwards; with one scale per projection
(`group_size: tensor`) each row is quantised with the scale of its projection.

The ternary values are those of the training forward, bit for bit: the same operator on the same
latent weight, rows that were sharded summed in the same slices and order.

Shape legend: O out, I in, G groups per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_bitcpm import ops
from megatron_bitcpm.checkpoint.reader import CheckpointReader
from megatron_bitcpm.config import ModelConfig, QuantConfig
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.parallel.projections import ProjectionRows, projection_scales
from megatron_bitcpm.quant.groups import ShardedGroups, abs_sums_sliced, resolve_sharded_groups
from megatron_bitcpm.quant.selection import is_excluded

NUMERICS = ("fp32",)
"""Arithmetics of a quantiser stamp that this module reproduces."""


@dataclass(frozen=True)
class FusedLinear:
    """One of Megatron's four linears of a layer.

    Attributes:
        name: below ``decoder.layers.N``.
        hf_names: below ``model.layers.N``, in the order in which `split` returns the parts.
        row_parallel: whether tensor parallelism shards the inputs.
    """

    name: str
    hf_names: tuple[str, ...]
    row_parallel: bool

    def rows(self, model: ModelConfig) -> ProjectionRows:
        """Which rows belong to which projection."""
        # self_attn.q_proj -> q
        names = tuple(name.split(".")[-1].removesuffix("_proj") for name in self.hf_names)
        return ProjectionRows(
            names, model.num_query_groups, model.num_attention_heads, model.head_dim
        )

    def shape(self, model: ModelConfig) -> tuple[int, int]:
        """Rows and inputs of the full fused weight, (O, I)."""
        queries = model.num_attention_heads * model.head_dim
        return {
            "self_attention.linear_qkv": (
                queries + 2 * model.num_query_groups * model.head_dim,
                model.hidden_size,
            ),
            "self_attention.linear_proj": (model.hidden_size, queries),
            "mlp.linear_fc1": (2 * model.ffn_hidden_size, model.hidden_size),
            "mlp.linear_fc2": (model.hidden_size, model.ffn_hidden_size),
        }[self.name]

    def split(self, weight: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Split a fused weight, [O, I], into the rows of its projections."""
        return self.rows(model).split(weight)


LINEARS = (
    FusedLinear(
        "self_attention.linear_qkv",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        row_parallel=False,
    ),
    FusedLinear("self_attention.linear_proj", ("self_attn.o_proj",), row_parallel=True),
    FusedLinear("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj"), row_parallel=False),
    FusedLinear("mlp.linear_fc2", ("mlp.down_proj",), row_parallel=True),
)
_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class QuantizerStamp:
    """The quantiser that a checkpoint was trained with.

    Attributes:
        quant: its configuration.
        tp_size: tensor-parallel size of the training; decides the slices of sharded rows.
    """

    quant: QuantConfig
    tp_size: int

    def is_ternary(self, linear: FusedLinear, layer: int, num_layers: int) -> bool:
        """Whether a linear was trained quantised, or stayed in full precision."""
        name = f"decoder.layers.{layer}.{linear.name}"
        return not is_excluded(name, layer, num_layers, self.quant)

    def groups_of(self, linear: FusedLinear, in_features: int) -> ShardedGroups | None:
        """How the groups of a quantised linear lie; None with one scale per projection."""
        if self.quant.group_size == "tensor":
            return None
        return resolve_sharded_groups(
            in_features,
            self.tp_size,
            self.quant.group_size,
            "row" if linear.row_parallel else "column",
            self.quant.scale_sync,
        )


def read_stamp(reader: CheckpointReader) -> QuantizerStamp | None:
    """Return the quantiser of a checkpoint, None where it was trained in full precision.

    Raises:
        CheckpointError: the stamp is damaged, or of a quantiser unknown here.
    """
    stamp = reader.state.get("quantizer")
    return None if stamp is None else parse_stamp(stamp, reader.folder)


def parse_stamp(stamp: Any, source: Path) -> QuantizerStamp:
    """Check a quantiser stamp and return what it says.

    Args:
        stamp: content of ``quantizer`` in a JSON file.
        source: the file or its folder, for messages.

    Raises:
        CheckpointError: the stamp is damaged, or of a quantiser that is not exported.
    """
    try:
        fields = {key: stamp[key] for key in QuantConfig.model_fields if key in stamp}
        quant = QuantConfig(**fields)
        tp_size, numerics = int(stamp["tensor_model_parallel_size"]), stamp["numerics"]
        if tp_size < 1:
            raise ValueError(f"tensor_model_parallel_size {tp_size}")
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError.of(
            "quantizer", source, f"unreadable stamp: {reason}",
            "Use the package version that wrote the checkpoint",
        ) from error  # fmt: skip
    if quant.grid != "ternary":
        raise CheckpointError.of(
            "quant.grid", quant.grid, "Hugging Face exports hold ternary weights only",
            "Train with quant.grid=ternary to export",
        )  # fmt: skip
    if numerics not in NUMERICS:
        raise CheckpointError.of(
            "numerics", numerics, f"the checkpoint's codes need {' or '.join(NUMERICS)}",
            "Use the package version that wrote the checkpoint",
        )  # fmt: skip
    return QuantizerStamp(quant, tp_size)


def fake_quantize_full(
    w_OI: torch.Tensor, groups: ShardedGroups, tp_size: int, eps: float
) -> torch.Tensor:
    """Return the wq that all ranks of the training held together.

    Args:
        w_OI: full latent weight, [O, I], in the dtype of the training.
        groups: from `QuantizerStamp.groups_of`.
        tp_size: tensor-parallel size of the training.
        eps: smallest scale.
    Returns:
        wq_OI, dtype of w.
    """
    if groups.needs_sum_exchange:
        scales_OG = ops.scales_from_sums(abs_sums_sliced(w_OI, tp_size), groups.scale_len, eps)
        return ops.fake_quantize_with_scales(w_OI, scales_OG)
    return ops.fake_quantize(w_OI, groups.scale_len, eps)


def fake_quantize_projections(
    w_OI: torch.Tensor, rows: ProjectionRows, row_parallel: bool, tp_size: int, eps: float
) -> torch.Tensor:
    """Like `fake_quantize_full`, with one scale per projection.

    Args:
        w_OI: full fused latent weight, [O, I].
        rows: which row belongs to which projection.
        row_parallel: whether the training had cut the rows into tp_size slices.
        tp_size: tensor-parallel size of the training.
        eps: smallest scale.
    """
    sums_O1 = abs_sums_sliced(w_OI, tp_size) if row_parallel else ops.abs_sums(w_OI, -1)
    scales_O1 = projection_scales(sums_O1.flatten(), rows, w_OI.shape[1], eps, "ternary")
    return ops.fake_quantize_with_scales(w_OI, scales_O1)


def read_forward_weight(
    reader: CheckpointReader, stamp: QuantizerStamp | None, linear: FusedLinear, layer: int
) -> torch.Tensor:
    """Return the fused weight that the forward multiplies with, [O, I].

    Args:
        reader: the checkpoint.
        stamp: its quantiser; None returns the stored weight.
        linear: one of `LINEARS`.
        layer: global layer number, from 0.
    """
    w_OI, model = reader.layer_tensor(f"{linear.name}.weight", layer), reader.config.model
    if stamp is None or not stamp.is_ternary(linear, layer, model.num_layers):
        return w_OI
    groups, eps = stamp.groups_of(linear, w_OI.shape[1]), stamp.quant.eps
    if groups is None:
        return fake_quantize_projections(
            w_OI, linear.rows(model), linear.row_parallel, stamp.tp_size, eps
        )
    return fake_quantize_full(w_OI, groups, stamp.tp_size, eps)


def list_ternary_tensors(model: ModelConfig, stamp: QuantizerStamp | None) -> dict[str, int]:
    """Return the ternary Hugging Face tensors: name -> weights per scale.

    These are consecutive inputs of a row, or all weights of the tensor.
    """
    if stamp is None:
        return {}
    tensors = {}
    for layer in range(model.num_layers):
        for linear in LINEARS:
            if not stamp.is_ternary(linear, layer, model.num_layers):
                continue
            out_features, in_features = linear.shape(model)
            groups = stamp.groups_of(linear, in_features)
            parts = linear.rows(model).split(torch.arange(out_features))
            for name, part in zip(linear.hf_names, parts, strict=True):
                size = part.numel() * in_features if groups is None else groups.scale_len
                tensors[f"model.layers.{layer}.{name}.weight"] = size
    return tensors


def iter_hf_tensors(
    reader: CheckpointReader, quantized: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the Hugging Face model, one at a time.

    Args:
        reader: the checkpoint.
        quantized: fake-quantise what training fake-quantised; False yields the latent weights.
    Yields:
        (name, contiguous tensor of its own memory, in the dtype of the training).

    Raises:
        CheckpointError: damaged files, or a non-finite value.
    """
    stamp = read_stamp(reader) if quantized else None
    for name, tensor in _iter_views(reader, stamp):
        if not tensor.isfinite().all():
            raise CheckpointError.of(
                "checkpoint", reader.folder, f"{name} holds a NaN or an infinity",
                "The run had diverged; use an earlier checkpoint",
            )  # fmt: skip
        # Parts of a fused weight share memory, which safetensors refuses.
        yield name, tensor.clone(memory_format=torch.contiguous_format)


def _iter_views(
    reader: CheckpointReader, stamp: QuantizerStamp | None
) -> Iterator[tuple[str, torch.Tensor]]:
    model = reader.config.model
    yield "model.embed_tokens.weight", _read_vocabulary(reader, _EMBEDDING)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for linear in LINEARS:
            weight = read_forward_weight(reader, stamp, linear, layer)
            parts = linear.split(weight, model)
            for name, part in zip(linear.hf_names, parts, strict=True):
                yield f"{prefix}{name}.weight", part
        for name, hf_name in _NORMS.items():
            yield prefix + hf_name, reader.layer_tensor(name, layer)
    yield "model.norm.weight", reader.tensor(_FINAL_NORM)
    if not model.share_embeddings_and_output_weights:
        yield "lm_head.weight", _read_vocabulary(reader, _OUTPUT)


def _read_vocabulary(reader: CheckpointReader, name: str) -> torch.Tensor:
    """Read an embedding without the rows that only pad it, [V, H]."""
    vocab_size = vocabulary_size(reader)
    tensor = reader.tensor(name)
    if tensor.shape[0] < vocab_size:
        raise CheckpointError.of(
            "vocab_size", vocab_size, f"{name} has {tensor.shape[0]} rows",
            "The checkpoint is damaged; use another one",
        )  # fmt: skip
    return tensor[:vocab_size]


def vocabulary_size(reader: CheckpointReader) -> int:
    """Ids of the tokenizer that the checkpoint was trained with."""
    size: Any = reader.state.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError.of(
            "vocab_size", size, f"is no size, in {reader.folder}",
            "The checkpoint is damaged; use another one",
        )  # fmt: skip
    return size
