"""ternarize_ on models that are not our Llama: LayerNorm and biases, experts."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny_models import SEQ, VOCAB, model_parallel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.parallel.scale_sync import update_given_scales

pytestmark = pytest.mark.both_versions


def build(spec: str, **changes) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    common = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if spec == "gpt":
        config = TransformerConfig(**common, qk_layernorm=True)
        layer = get_gpt_layer_local_spec(qk_layernorm=True)
    else:
        config = TransformerConfig(**common, num_moe_experts=3, add_bias_linear=False, **changes)
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


def scales_of_experts(rank: int, expert_tp: int) -> dict[str, tuple]:
    """(scales, those of numpy) of attention and experts, each sharded over ranks of its own."""
    from megatron.core import parallel_state

    from megatron_bitcpm.parallel.convert import ternarize_

    sizes = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": expert_tp}
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)
    model = build("experts", ffn_hidden_size=128, **sizes)
    ternary = ternarize_(model, QuantConfig(group_size="tensor"))
    found = {}
    for site in ternary.sites:
        level = (1 if rank == 0 else 3) * (1 + len(found))
        torch.nn.init.constant_(site.weight, level)
        found[site.name] = [site.quantizer.tp_size, level]
    update_given_scales(ternary.sites)
    for site in ternary.sites:
        found[site.name].append(site.scales_OG.unique().tolist())
    return found


@pytest.mark.parametrize("expert_tp", [1, 2])
def test_experts_with_another_tensor_parallel_size(expert_tp):
    for rank, found in enumerate(run_ranks(2, scales_of_experts, expert_tp)):
        assert len(found) == 2 * (2 + 3 * 2)
        for name, (tp_size, level, scales) in found.items():
            assert tp_size == (expert_tp if "experts" in name else 2), name
            # Rank 0 holds 1, 2, 3, ... and rank 1 three times as much: the mean of both is double.
            both = level * (2 if rank == 0 else 2 / 3)
            assert scales == [both if tp_size == 2 else level], name
