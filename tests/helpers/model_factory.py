"""The tiny models of the tests: their sizes, their random tensors, and a source in memory.

Names, shapes and order of the tensors are written out here, independent of the package's map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.conversion.source import ModelSource

FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
)
# The values of FIELDS; without kv_channels a head has hidden_size / num_attention_heads.
SHAPES: dict[str, tuple[int | None, ...]] = {
    "default": (2, 64, 256, 4, 2, None, 16),
    "run": (2, 64, 128, 4, 2, None, 32),
    "store": (1, 64, 64, 2, 1, None, 8),
    "memory": (3, 64, 96, 4, 2, 24, 64),
    "decoder": (4, 48, 80, 4, 2, 16, 64),
    "megatron": (4, 32, 48, 12, 4, 6, 64),
    "flat": (4, 8, 8, 6, 3, 4, 8),
    "deep": (8, 8, 16, 2, 1, None, 8),
    "map": (2, 16, 24, 4, 2, None, 32),
    "grid": (2, 32, 64, 4, 2, None, 32),
    "modeling": (2, 64, 160, 4, 2, None, 64),  # 160 is not a multiple of 64
    "hf": (2, 64, 96, 4, 2, None, 64),
    "by_hand": (2, 32, 48, 4, 2, 16, 64),
    "1B/16": (2, 128, 384, 16, 2, 16, 64),  # the released 1B divided by 16
}
# Beyond the sizes.
OTHER_FIELDS: dict[str, dict[str, Any]] = {
    "megatron": {
        "rotary_base": 5000,
        "layernorm_epsilon": 1e-5,
        "make_vocab_size_divisible_by": 8,
    },
    "modeling": {"rotary_base": 5000, "layernorm_epsilon": 1e-5},
}
TIED = {"share_embeddings_and_output_weights": True}
MUP = {"architecture": "minicpm", "scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16}
"""The constants of a MiniCPM."""
ORDERS = {
    "forward": ("embedding", "layers", "norm", "output"),
    "norm_second": ("embedding", "norm", "layers", "output"),
    "layers_last": ("embedding", "norm", "output", "layers"),
}
"""Orders of a model's tensors; in `forward` a layer's norms stand before what they feed."""


def tiny_fields(shape: str = "default", **changes: Any) -> dict[str, Any]:
    """The model section of a configuration."""
    sizes = {k: v for k, v in zip(FIELDS, SHAPES[shape], strict=True) if v is not None}
    return {**sizes, **OTHER_FIELDS.get(shape, {}), **changes}


def tiny_model(shape: str = "default", **changes: Any) -> ModelConfig:
    """A model of `SHAPES`; changes are fields of `ModelConfig`."""
    return ModelConfig(**tiny_fields(shape, **changes))


def layer_shapes(model: ModelConfig, order: str = "forward") -> dict[str, tuple[int, ...]]:
    """Name inside a layer -> shape."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_query_groups * model.head_dim
    before, between = {"input_layernorm": (hidden,)}, {"post_attention_layernorm": (hidden,)}
    attention = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    mlp = {
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    if order == "forward":
        return before | attention | between | mlp
    return attention | mlp | before | between


def tensor_shapes(
    model: ModelConfig, vocab_size: int, order: str = "forward"
) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, in one of `ORDERS`."""
    table = (vocab_size, model.hidden_size)
    parts = {
        "embedding": {"model.embed_tokens.weight": table},
        "norm": {"model.norm.weight": (model.hidden_size,)},
        "output": {"lm_head.weight": table},
        "layers": {
            f"model.layers.{layer}.{name}.weight": shape
            for layer in range(model.num_layers)
            for name, shape in layer_shapes(model, order).items()
        },
    }
    if model.share_embeddings_and_output_weights:
        parts["output"] = {}
    return {name: shape for part in ORDERS[order] for name, shape in parts[part].items()}


def random_tensors(
    model: ModelConfig,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    scale: float = 1.0,
    norm_mean: float = 0.0,
    seed: int = 0,
    order: str = "forward",
) -> dict[str, torch.Tensor]:
    """Gaussian tensors of standard deviation `scale`, drawn in the given order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * scale + norm_mean * (len(shape) == 1)).to(
            dtype
        )
        for name, shape in tensor_shapes(model, vocab_size, order).items()
    }


@dataclass(frozen=True, kw_only=True)
class MemorySource(ModelSource):
    """A model whose tensors are in a dictionary, Hugging Face name -> tensor."""

    tensors: dict[str, torch.Tensor]

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]
