"""Every layout computes the loss and the gradients of one rank, from the same weights."""

from __future__ import annotations

import pytest
import torch
from helpers.model_cases import (
    LONGROPE,
    VOCAB,
    batch,
    fill_by_name_,
    global_name,
    shard,
)
from helpers.model_factory import MUP, TIED, tiny_model
from helpers.ranks import run_ranks

from megatron_bitcpm.arch.counts import count_ternary_linears
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.config import ParallelConfig, QuantConfig
from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.models import context_parallel
from megatron_bitcpm.models.context_parallel import slice_for_context_parallel
from megatron_bitcpm.models.decoder import Decoder, build_transformer_config
from megatron_bitcpm.parallel.megatron_api import (
    build_pipeline_chunks,
    sharded_state_dict_of_chunks,
)
from megatron_bitcpm.patching.versions import megatron_version

pytestmark = pytest.mark.both_versions

SEQ = 24
MICRO_BATCHES = [batch([[5, 11, 8], [1, 20, 3]], seed=1), batch([[13, 11], [2, 22]], seed=2)]
MODELS = {
    "minicpm": {**MUP, "rope_scaling": LONGROPE, **TIED},
    "llama": {},
}


def build_chunks(model: ModelConfig, parallel: ParallelConfig, recompute: str = "none"):
    config = build_transformer_config(model, parallel, torch.float32, recompute)
    chunks = build_pipeline_chunks(lambda **stage: Decoder(config, model, VOCAB, SEQ, **stage))
    for chunk in chunks:
        fill_by_name_(chunk)
    return config, chunks


def loss_and_gradients(rank: int, name: str, layout: dict, recompute: str, mutant: bool):
    """((sum of losses, tokens), {name: (gradient, sharded dimension or -1)}, tensor rank)."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_bitcpm.training.runtime import start_runtime

    if mutant:
        double_the_gathered_gradient()
    parallel = ParallelConfig(**layout)
    with start_runtime(parallel, 0):
        model = tiny_model("decoder", **MODELS[name])
        config, built = build_chunks(model, parallel, recompute)
        config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        chunks = [DistributedDataParallel(config, ddp, chunk) for chunk in built]
        for chunk in chunks:
            chunk.zero_grad_buffer()
        iterators = [iter(MICRO_BATCHES) for _ in chunks]
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=2,
            seq_length=SEQ,
            micro_batch_size=2,
            forward_only=False,
        )
        sums = sum(outputs) if outputs else torch.zeros(2)
        group = parallel_state.get_context_parallel_group()
        torch.distributed.all_reduce(sums, group=group)
        gradients = {
            global_name(chunk, local): (
                parameter.main_grad.numpy().copy(),
                getattr(parameter, "partition_dim", -1)
                if getattr(parameter, "tensor_model_parallel", False)
                else -1,
            )
            for chunk in built
            for local, parameter in chunk.named_parameters()
        }
        tp = parallel_state.get_tensor_model_parallel_rank()
        return sums.tolist(), gradients, tp


def forward_step(iterator, model):
    from megatron.core import parallel_state

    data = next(iterator)
    place = (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )
    tokens, positions, labels = (
        slice_for_context_parallel(data[key], *place)
        for key in ("tokens", "position_ids", "labels")
    )
    output = model(tokens, positions, data["document_start"], labels=labels)

    def sum_loss(losses):
        total, count = losses.sum(), torch.tensor(losses.numel(), dtype=torch.int)
        pair = torch.stack([total.detach(), count.float()])
        if megatron_version() < (0, 16):
            # The older finalize_model_grads adds the counts of data-parallel ranks only, and would
            # divide the gradient by the tokens of a part of the sequence.
            count = count * place[1]
        return total, count, pair

    return output, sum_loss


def double_the_gathered_gradient() -> None:
    right = context_parallel._Gather.backward

    def doubled(ctx, grad):
        return right(ctx, 2 * grad)

    context_parallel._Gather.backward = staticmethod(doubled)


@pytest.fixture(scope="module")
def one_rank():
    return {name: run_ranks(1, loss_and_gradients, name, {}, "none", False)[0] for name in MODELS}


TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
LAYOUTS = {
    "tp2": ("minicpm", {TP: 2}, "none"),
    "tp2-sp": ("minicpm", {TP: 2, "sequence_parallel": True}, "none"),
    "pp2": ("minicpm", {PP: 2}, "none"),
    "pp2-vpp2-untied": ("llama", {PP: 2, VPP: 2}, "none"),
    "cp2": ("minicpm", {CP: 2}, "none"),
    "cp2-untied-selective": ("llama", {CP: 2}, "selective"),
    "cp3-full": ("minicpm", {CP: 3}, "full"),
    "tp2-cp2-sp": ("minicpm", {TP: 2, CP: 2, "sequence_parallel": True}, "none"),
    "tp2-pp2": ("minicpm", {TP: 2, PP: 2}, "none"),
    "tp4-replicated-keys": ("llama", {TP: 4, "sequence_parallel": True}, "none"),
}
SLOW = ("cp3-full", "tp2-cp2-sp", "tp4-replicated-keys", "tp2", "pp2", "cp2", "tp2-pp2")


def world_of(layout: dict) -> int:
    return ParallelConfig(**layout).layout.model_parallel_size


def largest_error(one_rank, ranks) -> float:
    """Of any loss or gradient shard, relative to its largest element; every name must occur."""
    (loss, count), full, _ = one_rank
    losses = [sums for sums, _, _ in ranks if sums[1]]
    assert losses and {sums[1] for sums in losses} == {count} == {2.0 * 2 * SEQ}
    errors = [abs(sums[0] / loss - 1) for sums in losses]
    seen: set[str] = set()
    tp_size = 1 + max(tp for _, _, tp in ranks)
    for _, gradients, tp in ranks:
        seen |= gradients.keys()
        for name, (found, dim) in gradients.items():
            found, whole = torch.from_numpy(found), torch.from_numpy(full[name][0])
            marked = torch.nn.Parameter(found)
            marked.tensor_model_parallel, marked.partition_dim = dim >= 0, dim
            expected = shard(whole, name, marked, tp, tp_size)
            assert found.shape == expected.shape
            errors.append(float((found - expected).abs().max() / whole.abs().max()))
    assert seen == full.keys()
    return max(errors)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS]
)
def test_loss_and_gradients_are_those_of_one_rank(name, one_rank):
    model, layout, recompute = LAYOUTS[name]
    if name == "tp4-replicated-keys" and megatron_version() < (0, 16):
        with pytest.raises(AssertionError, match="num_query_groups=2: is not a multiple of"):
            run_ranks(world_of(layout), loss_and_gradients, model, layout, recompute, False)
        return
    ranks = run_ranks(world_of(layout), loss_and_gradients, model, layout, recompute, False)
    assert largest_error(one_rank[model], ranks) < 1e-5


def test_a_doubled_gradient_of_keys_and_values_would_be_noticed(one_rank):
    ranks = run_ranks(2, loss_and_gradients, "minicpm", {CP: 2}, "none", True)
    assert largest_error(one_rank["minicpm"], ranks) > 0.1


def test_key_heads_shared_by_tensor_ranks_are_refused_by_the_older_megatron(monkeypatch):
    monkeypatch.setattr("megatron_bitcpm.models.decoder.megatron_version", lambda: (0, 12))
    parallel = ParallelConfig(tensor_model_parallel_size=4)
    with pytest.raises(ModelError) as error:
        build_transformer_config(tiny_model("decoder"), parallel, torch.float32)
    assert str(error.value).startswith("model.num_query_groups=2: is not a multiple of parallel.")
    assert "\n" not in str(error.value)


def layers_and_checkpoint(rank: int, layout: dict):
    """Layer numbers and ternary linears by formula and as built; checkpoint keys with offsets."""
    from megatron_bitcpm.parallel.convert import ternarize_
    from megatron_bitcpm.training.runtime import start_runtime

    parallel = ParallelConfig(**layout)
    model, quant = tiny_model("decoder"), QuantConfig(full_precision_first_layers=1)
    with start_runtime(parallel, 0) as runtime:
        _, chunks = build_chunks(model, parallel)
        stage = parallel.layout.layers_of_stage(model, runtime.pp_rank)
        built = [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]
        tensors = [
            (tensor.key, tensor.global_offset)
            for chunk in sharded_state_dict_of_chunks(chunks).values()
            for tensor in chunk.values()
            if hasattr(tensor, "global_offset")
        ]
        names = [global_name(chunk, n) for chunk in chunks for n, _ in chunk.named_parameters()]
        ternary = ternarize_(chunks, quant)
        return (
            stage,
            built,
            count_ternary_linears(model, quant.excludes, stage),
            len(ternary.sites),
            (
                tensors,
                names,
            ),
        )


def stock_names(rank: int) -> list[str]:
    """Parameters of the GPTModel that Megatron builds from its own spec."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_bitcpm.training.runtime import start_runtime

    with start_runtime(ParallelConfig(), 0):
        config = build_transformer_config(tiny_model("decoder"), ParallelConfig(), torch.float32)
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        return [
            name
            for name, _ in GPTModel(
                config,
                spec,
                vocab_size=VOCAB,
                max_sequence_length=64,
                position_embedding_type="rope",
            ).named_parameters()
        ]


@pytest.mark.parametrize("layout", [{PP: 2}, {PP: 2, VPP: 2}], ids=["pp2", "pp2-vpp2"])
def test_layers_checkpoint_and_counts_of_pipeline_stages(layout):
    ranks = run_ranks(2, layers_and_checkpoint, layout)
    by_hand = [[0, 1], [2, 3]] if VPP not in layout else [[0, 2], [1, 3]]
    places: dict[str, list[int]] = {}
    names: list[str] = []
    for (stage, built, formula, swapped, (tensors, own)), layers in zip(
        ranks, by_hand, strict=True
    ):
        assert stage == built == layers
        assert formula == swapped == 4 * len([layer for layer in layers if layer > 0])
        names += own
        for key, offset in tensors:
            if ".layers." in key:
                places.setdefault(key, []).append(offset[0])
    # Layers are stacked along the first dimension of one stored tensor, whoever holds them.
    assert places["decoder.layers.self_attention.linear_qkv.weight"]
    assert all(sorted(offsets) == [0, 1, 2, 3] for offsets in places.values()), places
    assert sorted(names) == sorted(run_ranks(1, stock_names)[0])
