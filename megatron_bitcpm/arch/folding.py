"""MiniCPM's three constants, multiplied into the weights of a plain Llama.

model.embed_tokens        x scale_emb
o_proj, down_proj         x scale_depth / sqrt(layers)
lm_head                   x dim_model_base / hidden_size
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import EMBEDDING, FAMILIES, OUTPUT, Place
from megatron_bitcpm.records import Record

_Positive = Annotated[float, Field(gt=0)]


class Folding(Record):
    """The factors of a folded MiniCPM, and the constants that the last two were made of."""

    scale_emb: _Positive
    residual: _Positive
    output: _Positive
    scale_depth: _Positive
    dim_model_base: Annotated[int, Field(gt=0)]

    def factor(self, place: Place) -> float | None:
        """Return the factor of a tensor, None where it has none."""
        if place.spec.role == EMBEDDING.role:
            return self.scale_emb
        if place.spec.role == OUTPUT.role:
            return self.output
        return self.residual if place.spec.writes_residual else None


def find_folding(model: ModelConfig) -> Folding:
    """Return the factors of a MiniCPM; an absent constant has none."""
    scale_depth = model.scale_depth or math.sqrt(model.num_layers)
    dim_model_base = model.dim_model_base or model.hidden_size
    return Folding(
        scale_emb=model.scale_emb or 1.0,
        residual=scale_depth / math.sqrt(model.num_layers),
        output=dim_model_base / model.hidden_size,
        scale_depth=scale_depth,
        dim_model_base=dim_model_base,
    )


def plain_llama(model: ModelConfig) -> ModelConfig:
    """Return the architecture of a folded MiniCPM; tied embeddings would need two factors."""
    content: dict[str, Any] = model.model_dump() | {
        "architecture": "llama",
        "share_embeddings_and_output_weights": False,
        **dict.fromkeys(FAMILIES[model.architecture].constants),
    }
    return ModelConfig(**content)
