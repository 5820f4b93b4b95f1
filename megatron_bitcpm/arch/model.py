"""The architecture of one model, and the tensors that follow from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from megatron_bitcpm.arch.tensors import (
    FAMILIES,
    Dimensions,
    Family,
    Place,
    Shape,
    TensorSpec,
    iter_specs,
    name_of,
)
from megatron_bitcpm.records import Section

Form = Literal["latent", "pseudo", "plain"]
"""What the weights of a model are: trained parameters of a quantised model, which its forward
quantises; the values of that forward, on their grid; or those of a model without a quantiser."""
_Factor = Annotated[float, Field(gt=0)]


class RopeScalingConfig(Section):
    """LongRoPE: one divisor for each rotary frequency, of short and of long sequences.

    The arrays are those of a released model: `load_config` copies them from its `hf_config`.
    """

    rope_type: Literal["longrope"] = Field("longrope", description="Kind of scaling.")
    hf_config: str | None = Field(
        None, description="A Hugging Face config.json to read all other fields from."
    )
    source: str | None = Field(None, description="Where the factors were read from; a note.")
    short_factor: tuple[_Factor, ...] = Field(
        (), description="Divisors for sequences up to the original length; head_dim / 2 numbers."
    )
    long_factor: tuple[_Factor, ...] = Field(
        (), description="Divisors for longer sequences; head_dim / 2 numbers."
    )
    original_max_position_embeddings: int | None = Field(
        None, ge=2, description="Length up to which short_factor applies, in tokens."
    )
    attention_factor: float | None = Field(
        None,
        gt=0,
        description="Multiplies cos and sin; default sqrt(1 + ln(max / original) / ln(original)).",
    )


class ModelConfig(Section):
    """The architecture: a Llama decoder (RMSNorm, SwiGLU, RoPE, grouped queries), or MiniCPM.

    MiniCPM is Llama with three constants (muP); they are carried in training, never folded.
    """

    architecture: str = Field(
        "llama", description="Model family.", json_schema_extra={"enum": list(FAMILIES)}
    )
    num_layers: int = Field(ge=1, description="Transformer layers.")
    hidden_size: int = Field(ge=8, description="Width of the residual stream.")
    ffn_hidden_size: int = Field(ge=8, description="Width of the SwiGLU hidden layer.")
    num_attention_heads: int = Field(ge=1, description="Query heads.")
    num_query_groups: int = Field(ge=1, description="Key/value heads.")
    kv_channels: int | None = Field(
        None, ge=2, description="Head dimension; default hidden_size / num_attention_heads."
    )
    max_position_embeddings: int = Field(ge=2, description="Longest sequence, in tokens.")
    rotary_base: int = Field(10000, ge=2, description="RoPE theta.")
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="LongRoPE; default plain RoPE."
    )
    scale_emb: float | None = Field(
        None, gt=0, description="MiniCPM: the embedding is multiplied by this."
    )
    scale_depth: float | None = Field(
        None, gt=0, description="MiniCPM: residuals are multiplied by this / sqrt(num_layers)."
    )
    dim_model_base: int | None = Field(
        None, ge=1, description="MiniCPM: logits are divided by hidden_size / this."
    )
    layernorm_epsilon: float = Field(1e-6, gt=0, description="RMSNorm epsilon.")
    init_method_std: float = Field(0.02, gt=0, description="Standard deviation at initialisation.")
    share_embeddings_and_output_weights: bool = Field(
        False, description="Tie the input embedding and the output layer."
    )
    make_vocab_size_divisible_by: int = Field(
        128, ge=1, description="The embedding is padded to a multiple of this; tp must divide it."
    )

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def family(self) -> Family:
        """Its row of `FAMILIES`."""
        return FAMILIES[self.architecture]

    @property
    def has_constants(self) -> bool:
        """Whether it is a Llama with constants, which can be folded into its weights."""
        return bool(self.family.constants)

    def dimensions(self, vocab_size: int = 1) -> Dimensions:
        """Return the sizes that the shapes of its tensors are made of."""
        return Dimensions(
            self.hidden_size,
            self.num_attention_heads,
            self.num_query_groups,
            self.head_dim,
            self.ffn_hidden_size,
            vocab_size,
        )

    @field_validator("architecture")
    @classmethod
    def _check_architecture(cls, value: str) -> str:
        if value not in FAMILIES:
            known = " or ".join(repr(name) for name in FAMILIES)
            raise PydanticCustomError("architecture", f"must be {known}")
        return value


def attention_factor(model: ModelConfig) -> float:
    """Return the number by which LongRoPE multiplies cos and sin; 1 without LongRoPE."""
    rope = model.rope_scaling
    if rope is None:
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    original = rope.original_max_position_embeddings
    assert original is not None
    growth = model.max_position_embeddings / original
    return math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0


def iter_tensors(
    model: ModelConfig, layers: Sequence[int] | None = None
) -> Iterator[tuple[TensorSpec, int | None]]:
    """Yield (row of the map, layer) of every tensor, in the order of the forward pass.

    `layers` are global numbers; None means all.
    """
    numbers = range(model.num_layers) if layers is None else layers
    return iter_specs(model.family.tensors, numbers, model.share_embeddings_and_output_weights)


def iter_places(model: ModelConfig) -> Iterator[Place]:
    """Yield every tensor as formats that do not fuse have it; of a layer its norms last."""
    for layer, found in itertools.groupby(iter_tensors(model), lambda entry: entry[1]):
        specs = [spec for spec, _ in found]
        if layer is not None:
            specs.sort(key=lambda spec: spec.role == "norm")
        for spec in specs:
            for part in range(len(spec.parts)):
                yield Place(spec, part, layer)


def shapes_of(model: ModelConfig, vocab_size: int, format: str = "hf") -> dict[str, Shape]:
    """Return name -> shape of every tensor in a format that does not fuse."""
    dims = model.dimensions(vocab_size)
    return {place.name(format): place.shape(dims) for place in iter_places(model)}


def megatron_shapes(model: ModelConfig, rows: int) -> dict[str, Shape]:
    """Return Megatron's name -> full shape of every tensor; `rows` of the padded embedding."""
    dims = model.dimensions(rows)
    return {name_of(spec, layer): spec.shape(dims) for spec, layer in iter_tensors(model)}
