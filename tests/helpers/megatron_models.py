"""Small models in memory, and an independent cut of Hugging Face's weights into Megatron's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.conversion.source import ModelSource

BASE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 6,
    "max_position_embeddings": 64,
    "rotary_base": 5000,
    "layernorm_epsilon": 1e-5,
    "make_vocab_size_divisible_by": 8,
}
LONG_ROPE = {
    "short_factor": (1.0, 1.5, 2.5),
    "long_factor": (1.0, 3.0, 7.0),
    "original_max_position_embeddings": 16,
}
MODELS = {
    "untied": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "minicpm": {
        "architecture": "minicpm",
        "scale_emb": 12.0,
        "scale_depth": 1.4,
        "dim_model_base": 8,
        "rope_scaling": LONG_ROPE,
        "share_embeddings_and_output_weights": True,
    },
}
VOCAB = 61


@dataclass(frozen=True, kw_only=True)
class MemorySource(ModelSource):
    """A model whose tensors are given."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def dtype(self, name):
        return self.tensors[name].dtype

    def tensor(self, name):
        return self.tensors[name]


def make_source(tmp_path, case="untied", norm_dtype=torch.float32, **changes):
    """Return a model of one of `MODELS` with random bfloat16 weights."""
    model = ModelConfig(**{**BASE, **MODELS[case], **changes})
    generator = torch.Generator().manual_seed(1)
    source = MemorySource(
        path=tmp_path,
        kind="hf",
        form="plain",
        model=model,
        vocab_size=VOCAB,
        facts={"iteration": 7, "seq_length": 32},
    )
    for name, shape in source.shapes().items():
        dtype = norm_dtype if "norm" in name else torch.bfloat16
        source.tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    return source


def cut_layer(source, layer, tp_size, tp_rank):
    """Return one rank's tensors of a layer, cut by hand; local names of Megatron 0.12.1."""
    model, prefix = source.model, f"model.layers.{layer}."
    get = {
        key: source.tensors[f"{prefix}{key}.weight"]
        for key in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    d, groups = model.head_dim, model.num_query_groups
    per_group = model.num_attention_heads // groups
    fused = torch.cat(
        [
            get[f"self_attn.{kind}_proj"][start * d : stop * d]
            for group in range(groups)
            for kind, start, stop in (
                ("q", group * per_group, (group + 1) * per_group),
                ("k", group, group + 1),
                ("v", group, group + 1),
            )
        ]
    )
    return {
        "input_layernorm.weight": get["input_layernorm"],
        "self_attention.linear_qkv.weight": fused.tensor_split(tp_size, 0)[tp_rank],
        "self_attention.linear_proj.weight": get["self_attn.o_proj"].tensor_split(tp_size, 1)[
            tp_rank
        ],
        "pre_mlp_layernorm.weight": get["post_attention_layernorm"],
        "mlp.linear_fc1.weight": torch.cat(
            [
                get["mlp.gate_proj"].tensor_split(tp_size, 0)[tp_rank],
                get["mlp.up_proj"].tensor_split(tp_size, 0)[tp_rank],
            ]
        ),
        "mlp.linear_fc2.weight": get["mlp.down_proj"].tensor_split(tp_size, 1)[tp_rank],
    }


def assert_same(found, wanted):
    """Every tensor of two sources is bitwise equal, and so is what describes them."""
    assert found.shapes() == wanted.shapes()
    for name in wanted.shapes():
        a, b = found.tensor(name), wanted.tensor(name)
        assert a.dtype == b.dtype, name
        bits = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
        assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits)), name
    skip = {"make_vocab_size_divisible_by", "kv_channels"}
    assert found.model.model_dump(exclude=skip) == wanted.model.model_dump(exclude=skip)
    assert found.model.head_dim == wanted.model.head_dim
    assert (found.vocab_size, found.form) == (wanted.vocab_size, wanted.form)
