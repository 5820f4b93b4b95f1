"""ternarize_ on models that are not our Llama: LayerNorm and biases, experts."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny_models import SEQ, VOCAB, model_parallel

from megatron_bitcpm.config import QuantConfig

pytestmark = pytest.mark.both_versions


def build(spec: str) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    common = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False, "masked_softmax_fusion": False,
        "apply_rope_fusion": False, "bias_activation_fusion": False, "bias_dropout_fusion": False,
        "persist_layer_norm": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    if spec == "gpt":
        config = TransformerConfig(**common, qk_layernorm=True)
        layer = get_gpt_layer_local_spec(qk_layernorm=True)
    else:
        config = TransformerConfig(**common, num_moe_experts=3, add_bias_linear=False)
        layer = get_gpt_layer_local_spec(num_experts=3, moe_grouped_gemm=False)
    return GPTModel(
        config, layer, vocab_size=VOCAB, max_sequence_length=SEQ, position_embedding_type="rope"
    )


def ternarize_spec(rank: int, spec: str) -> tuple:
    from megatron_bitcpm.parallel.convert import ternarize_

    with model_parallel(seed=1):
        model = build(spec)
        ternary = ternarize_(model, QuantConfig())
        others = [
            name
            for name, module in model.named_modules()
            if getattr(module, "weight", None) is not None
            and module.weight.ndim == 2
            and not hasattr(module, "ternary")
        ]
        losses = None
        if spec == "gpt":
            tokens = torch.arange(SEQ)[None] % VOCAB
            loss = model(tokens, torch.arange(SEQ)[None], None, labels=tokens).mean()
            loss.backward()
            losses = float(loss), bool(ternary.sites[0].weight.grad.abs().sum() > 0)
        return [site.name for site in ternary.sites], others, losses


@pytest.mark.parametrize(
    ("spec", "linears_per_layer", "others"),
    [
        ("gpt", 4, []),
        ("experts", 2 + 3 * 2, ["decoder.layers.0.mlp.router", "decoder.layers.1.mlp.router"]),
    ],
)
def test_every_spec_of_megatron_linears(spec, linears_per_layer, others):
    names, untouched, losses = run_ranks(1, ternarize_spec, spec)[0]
    assert len(names) == 2 * linears_per_layer, names
    assert sorted(untouched) == sorted(["embedding.word_embeddings", "output_layer", *others]), (
        untouched
    )
    if losses:
        assert losses[0] > 0 and losses[1]
