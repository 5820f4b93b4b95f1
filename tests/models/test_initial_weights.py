"""Initial weights: every layout begins with those of one rank, bit for bit."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from helpers.model_cases import VOCAB, global_name, shard
from helpers.model_factory import MUP, TIED, tiny_model
from helpers.ranks import run_ranks

from megatron_bitcpm.config import ParallelConfig
from megatron_bitcpm.models.decoder import Decoder, build_transformer_config
from megatron_bitcpm.parallel.megatron_api import build_pipeline_chunks

pytestmark = pytest.mark.both_versions

EMBEDDING = "embedding.word_embeddings.weight"
MODELS = {
    "tied": {**MUP, **TIED},
    "untied": {"init_method_std": 0.05},
}


def initial_weights(rank: int, name: str, layout: dict, seed: int = 5) -> tuple[int, list]:
    """(tensor rank, [(name on this stage, name in the whole model, values, sharded dimension)])."""
    from megatron.core import parallel_state

    from megatron_bitcpm.training.initialize import initialize_weights_
    from megatron_bitcpm.training.runtime import start_runtime

    model, parallel = tiny_model("decoder", **MODELS[name]), ParallelConfig(**layout)
    # The seed from which Megatron draws is another on each rank.
    with start_runtime(parallel, 100 + rank):
        config = build_transformer_config(model, parallel, torch.float32)
        chunks = build_pipeline_chunks(lambda **stage: Decoder(config, model, VOCAB, 16, **stage))
        found = []
        for chunk in chunks:
            initialize_weights_(chunk, seed)
            for local, parameter in chunk.named_parameters():
                is_sharded = getattr(parameter, "tensor_model_parallel", False)
                dim = parameter.partition_dim if is_sharded else -1
                values = parameter.detach().numpy().copy()
                found.append((local, global_name(chunk, local), values, dim))
        return parallel_state.get_tensor_model_parallel_rank(), found


@pytest.fixture(scope="module")
def one_rank():
    return {
        model: {
            name: torch.from_numpy(values)
            for _, name, values, _ in run_ranks(1, initial_weights, model, {})[0][1]
        }
        for model in MODELS
    }


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param("tied", {TP: 2}, marks=pytest.mark.slow),
        pytest.param("tied", {PP: 2}, marks=pytest.mark.slow),
        ("tied", {TP: 2, PP: 2}),
        pytest.param("untied", {TP: 2}, marks=pytest.mark.slow),
        ("untied", {PP: 2, VPP: 2}),
    ],
    ids=["tied-tp2", "tied-pp2", "tied-tp2-pp2", "untied-tp2", "untied-pp2-vpp2"],
)
def test_shards_are_those_of_one_rank(model, layout, one_rank):
    world = ParallelConfig(**layout).layout.model_parallel_size
    seen, copies_of_embedding = set(), set()
    for tp_rank, found in run_ranks(world, initial_weights, model, layout):
        for local, name, values, dim in found:
            marked = torch.nn.Parameter(torch.from_numpy(values))
            marked.tensor_model_parallel, marked.partition_dim = dim >= 0, dim
            expected = shard(one_rank[model][name], name, marked, tp_rank, layout.get(TP, 1))
            assert torch.equal(marked, expected), (local, name)
            seen.add(name)
            if name == EMBEDDING:
                copies_of_embedding.add(local)
    assert seen == one_rank[model].keys()
    # With tied embeddings the last stage begins with a copy of the first stage's.
    has_copy = model == "tied" and PP in layout
    assert copies_of_embedding == ({EMBEDDING, "output_layer.weight"} if has_copy else {EMBEDDING})


def test_matrices_differ_and_have_their_standard_deviations(one_rank):
    matrices = {n: w for n, w in one_rank["untied"].items() if w.ndim == 2}
    assert len(matrices) == 2 + 4 * 4
    for a, b in combinations(matrices.values(), 2):
        assert a.shape != b.shape or not torch.equal(a, b)
    for name, matrix in matrices.items():
        # What is added to the residual stream is divided by the square root of twice the layers.
        divisor = 8**0.5 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1
        assert float(matrix.std()) == pytest.approx(0.05 / divisor, rel=0.06), name
        assert abs(float(matrix.mean())) < 0.05 / divisor * 0.08, name
    # Gate and up are two matrices, not one drawn twice.
    gate, up = matrices["decoder.layers.0.mlp.linear_fc1.weight"].chunk(2)
    assert not torch.equal(gate, up)
    vectors = [w for w in one_rank["untied"].values() if w.ndim == 1]
    assert len(vectors) == 2 * 4 + 1 and all(bool((w == 1).all()) for w in vectors)


def test_another_seed_gives_other_weights(one_rank):
    for _, name, values, _ in run_ranks(1, initial_weights, "untied", {}, 6)[0][1]:
        assert torch.equal(one_rank["untied"][name], torch.from_numpy(values)) == (values.ndim == 1)
