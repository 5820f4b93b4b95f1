"""Small models in memory, and an independent cut of Hugging Face's weights into Megatron's."""

from __future__ import annotations

import torch

from helpers.model_factory import MUP, TIED, MemorySource, layer_shapes, random_tensors, tiny_model

LONG_ROPE = {
    "short_factor": (1.0, 1.5, 2.5),
    "long_factor": (1.0, 3.0, 7.0),
    "original_max_position_embeddings": 16,
}
MODELS = {
    "untied": {},
    "tied": TIED,
    "minicpm": {**MUP, **TIED, "dim_model_base": 8, "rope_scaling": LONG_ROPE},
}
VOCAB = 61


def make_source(tmp_path, case="untied", norm_dtype=torch.float32, **changes):
    """Return a model of one of `MODELS` with random bfloat16 weights."""
    model = tiny_model("megatron", **{**MODELS[case], **changes})
    drawn = random_tensors(model, VOCAB, torch.float32, seed=1)
    return MemorySource(
        path=tmp_path,
        kind="hf",
        form="plain",
        model=model,
        vocab_size=VOCAB,
        facts={"iteration": 7, "seq_length": 32},
        tensors={n: t.to(norm_dtype if "norm" in n else torch.bfloat16) for n, t in drawn.items()},
    )


def cut_layer(source, layer, tp_size, tp_rank):
    """Return one rank's tensors of a layer, cut by hand; local names of Megatron 0.12.1."""
    model, prefix = source.model, f"model.layers.{layer}."
    get = {key: source.tensors[f"{prefix}{key}.weight"] for key in layer_shapes(model)}
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
