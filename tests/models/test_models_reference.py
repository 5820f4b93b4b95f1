"""Logits and gradients of the models against formulas written by hand, and transformers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import plain_decoder
from helpers.model_cases import (
    LONG,
    LONGROPE,
    SHORT,
    VOCAB,
    batch,
    fill_by_name_,
)
from helpers.model_factory import MUP, TIED, tiny_model
from helpers.plain_decoder import Shape

from megatron_bitcpm.config import ParallelConfig
from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.models.decoder import Decoder, build_transformer_config
from megatron_bitcpm.training.runtime import start_runtime

pytestmark = pytest.mark.both_versions

ONE = [[24], [24]]
PACKED = [[5, 11, 8], [1, 20, 3]]
# Positions begin anew, attention does not. (With both, the positions could go on: only their
# differences count.)
POSITIONS = [[9, 15], [16, 8]]
# sqrt(1 + ln(64 / 16) / ln(16)) = sqrt(1.5), worked by hand.
FACTOR = math.sqrt(1.5)
MUP_SHAPE = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16}

CASES = {
    "llama": ({}, {}, ONE),
    "llama-tied": (TIED, {}, ONE),
    "llama-documents": ({}, {}, PACKED),
    "llama-positions": ({}, {}, POSITIONS),
    "minicpm": (MUP, MUP_SHAPE, ONE),
    "minicpm-tied-documents": (
        {**MUP, **TIED},
        MUP_SHAPE,
        PACKED,
    ),
    "long": (
        {"rope_scaling": LONGROPE},
        {"rope_factors": LONG, "attention_factor": FACTOR},
        ONE,
    ),
    "short": (
        {"rope_scaling": LONGROPE},
        {"rope_factors": SHORT, "attention_factor": FACTOR},
        [[16], [16]],
    ),
    "minicpm-long-documents-given-factor": (
        {**MUP, "rope_scaling": {**LONGROPE, "attention_factor": 1.7}},
        {**MUP_SHAPE, "rope_factors": LONG, "attention_factor": 1.7},
        PACKED,
    ),
}


def build(changes: dict, seq_length: int, recompute: str = "none"):
    model = tiny_model("decoder", **changes)
    config = build_transformer_config(model, ParallelConfig(), torch.float32, recompute)
    built = Decoder(config, model, VOCAB, seq_length)
    fill_by_name_(built)
    return built


def run(built, data: dict, masked: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the gradients of the mean loss."""
    mask = data["document_start"] if masked else None
    built.zero_grad()
    logits = built(data["tokens"], data["position_ids"], mask)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"].flatten()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in built.named_parameters()}


def assert_close(found, expected, tolerance: float = 1e-4) -> None:
    """Equal up to a part of the largest element."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, float(error)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_all_gradients_are_those_of_the_formulas(name):
    changes, constants, lengths = CASES[name]
    shape = Shape(layers=4, heads=4, kv_heads=2, head_dim=16, **constants)
    data = batch(lengths)
    with start_runtime(ParallelConfig(), 0):
        built = build(changes, data["tokens"].shape[1])
        masked = lengths is PACKED
        logits, gradients = run(built, data, masked)
        weights = {n: p.detach().double().requires_grad_() for n, p in built.named_parameters()}
    documents = data["documents"] * masked
    expected = plain_decoder.logits(weights, data["tokens"], data["position_ids"], documents, shape)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), data["labels"].flatten()).backward()
    assert_close(logits, expected.detach())
    assert gradients.keys() == weights.keys()
    for key, weight in weights.items():
        assert_close(gradients[key], weight.grad)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute):
    data = batch(PACKED)
    changes = {**MUP, "rope_scaling": LONGROPE}
    with start_runtime(ParallelConfig(), 0):
        plain = run(build(changes, 24), data)
        again = run(build(changes, 24, recompute), data)
    assert torch.equal(again[0], plain[0])
    for key, gradient in plain[1].items():
        assert torch.equal(again[1][key], gradient), key


@pytest.mark.parametrize(
    "seq", [pytest.param(16, marks=pytest.mark.slow), 24], ids=["short", "long"]
)
def test_llama_with_longrope_is_the_one_of_transformers(seq):
    transformers = pytest.importorskip("transformers")
    data = batch([[seq], [seq]])
    with start_runtime(ParallelConfig(), 0):
        built = build({"rope_scaling": LONGROPE}, seq)
        found = built(data["tokens"], data["position_ids"], None).detach()
        weights = {name: p.detach() for name, p in built.named_parameters()}
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        attn_implementation="eager",
        rope_parameters={
            **LONGROPE,
            "rope_theta": 10000.0,
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
        },
    )
    config.original_max_position_embeddings = 16
    hf = transformers.LlamaForCausalLM(config)
    shape = Shape(layers=4, heads=4, kv_heads=2, head_dim=16)
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for layer in range(4):
        mine, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = weights[f"{mine}self_attention.linear_qkv.weight"]
        for kind, part in zip("qkv", plain_decoder.split_qkv(qkv, shape), strict=True):
            state[f"{theirs}self_attn.{kind}_proj.weight"] = part
        state[f"{theirs}self_attn.o_proj.weight"] = weights[
            f"{mine}self_attention.linear_proj.weight"
        ]
        gate, up = weights[f"{mine}mlp.linear_fc1.weight"].chunk(2)
        state[f"{theirs}mlp.gate_proj.weight"], state[f"{theirs}mlp.up_proj.weight"] = gate, up
        state[f"{theirs}mlp.down_proj.weight"] = weights[f"{mine}mlp.linear_fc2.weight"]
        state[f"{theirs}input_layernorm.weight"] = weights[f"{mine}input_layernorm.weight"]
        state[f"{theirs}post_attention_layernorm.weight"] = weights[
            f"{mine}pre_mlp_layernorm.weight"
        ]
    hf.load_state_dict(state)
    assert hf.model.rotary_emb.attention_scaling == pytest.approx(FACTOR)
    with torch.no_grad():
        assert_close(found, hf(data["tokens"]).logits)


def test_packed_documents_are_the_documents_apart():
    """Losses token by token, and the gradients of their sum."""
    data = batch(PACKED)
    changes = {**MUP, "rope_scaling": LONGROPE}
    with start_runtime(ParallelConfig(), 0):
        built = build(changes, 24)

        def losses_of(data: dict, mask) -> torch.Tensor:
            return built(data["tokens"], data["position_ids"], mask, labels=data["labels"])

        packed = losses_of(data, data["document_start"])
        packed.sum().backward()
        together = {name: p.grad.clone() for name, p in built.named_parameters()}
        built.zero_grad()
        apart = []
        for row, lengths in enumerate(PACKED):
            ends = torch.tensor(lengths).cumsum(0).tolist()
            for length, end in zip(lengths, ends, strict=True):
                cut = {k: v[row : row + 1, end - length : end] for k, v in data.items()}
                assert cut["position_ids"].tolist() == [list(range(length))]
                apart.append(losses_of(cut, None)[0])
        joined = torch.cat(apart).view_as(packed)
        joined.sum().backward()
        assert_close(packed.detach(), joined.detach(), 1e-5)
        for name, parameter in built.named_parameters():
            assert_close(together[name], parameter.grad, 1e-5)
        # Without the mask it is another loss.
        assert (losses_of(data, None) - packed).abs().max() > 0.1


def test_half_precision_norm_is_the_one_of_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from megatron_bitcpm.models.norm import RMSNorm

    config = build_transformer_config(tiny_model("decoder"), ParallelConfig(), torch.bfloat16)
    mine, theirs = RMSNorm(config, 48, eps=1e-6), modeling.LlamaRMSNorm(48, eps=1e-6)
    assert mine.weight.dtype == torch.bfloat16 and not mine.weight.sequence_parallel
    weight = 1 + 0.3 * torch.randn(48, dtype=torch.bfloat16)
    mine.weight.data.copy_(weight)
    theirs.bfloat16().weight.data.copy_(weight)
    x = 50 * torch.randn(7, 3, 48, dtype=torch.bfloat16)
    assert torch.equal(mine(x), theirs(x))


def test_another_kind_of_attention_mask_is_refused():
    data = batch(ONE)
    with start_runtime(ParallelConfig(), 0):
        built = build({}, 24)
        mask = torch.ones(1, 1, 24, 24, dtype=torch.bool)
        with pytest.raises(ModelError, match=r"attention_mask=bool \[1, 1, 24, 24\]: must be int"):
            built(data["tokens"], data["position_ids"], mask)
