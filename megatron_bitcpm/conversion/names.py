"""The table between Megatron's tensors and Hugging Face's, for Llama and MiniCPM.

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
inputs, so a group is never cut.

Shape legend: O out, I in, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.parallel.projections import ProjectionRows


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

    def row_counts(self, model: ModelConfig) -> tuple[int, ...]:
        """Return how many rows each projection has, in the order of `hf_names`."""
        if len(self.hf_names) == 3:
            keys = model.num_query_groups * model.head_dim
            return model.num_attention_heads * model.head_dim, keys, keys
        return (self.shape(model)[0] // len(self.hf_names),) * len(self.hf_names)

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
LAYER_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
"""Megatron's name -> Hugging Face's, inside a layer."""
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"

HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
HF_FINAL_NORM = "model.norm.weight"

_PROJECTION = re.compile(
    r"model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight"
)
_LINEAR_OF = {hf_name: linear for linear in LINEARS for hf_name in linear.hf_names}


@dataclass(frozen=True)
class Projection:
    """One of the seven projections of a layer under its Hugging Face name.

    Attributes:
        layer: global layer number, from 0.
        name: below ``model.layers.N``, without ``.weight``.
        linear: Megatron's linear that holds it.
    """

    layer: int
    name: str
    linear: FusedLinear

    @property
    def megatron_name(self) -> str:
        """Name of the fused linear as the quantiser's filters see it."""
        return f"decoder.layers.{self.layer}.{self.linear.name}"


def find_projection(hf_name: str) -> Projection | None:
    """Return which projection a Hugging Face tensor is, None for all others."""
    match = _PROJECTION.fullmatch(hf_name)
    if match is None:
        return None
    return Projection(int(match[1]), match[2], _LINEAR_OF[match[2]])


def hf_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return Hugging Face name -> shape of every tensor of a model, in the order of its layers.

    Args:
        model: the architecture.
        vocab_size: rows of the embedding, without padding.
    """
    hidden = model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {HF_EMBEDDING: (vocab_size, hidden)}
    of_layer: dict[str, tuple[int, ...]] = {}
    for linear in LINEARS:
        in_features = linear.shape(model)[1]
        for hf_name, rows in zip(linear.hf_names, linear.row_counts(model), strict=True):
            of_layer[f"{hf_name}.weight"] = (rows, in_features)
    of_layer |= dict.fromkeys(LAYER_NORMS.values(), (hidden,))
    for layer in range(model.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes[HF_FINAL_NORM] = (hidden,)
    if not model.share_embeddings_and_output_weights:
        shapes[HF_OUTPUT] = (vocab_size, hidden)
    return shapes
