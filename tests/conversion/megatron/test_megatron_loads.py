"""Stock Megatron, of the installed release, loads what was written; so does the decoder here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.megatron_models import VOCAB, cut_layer, make_source
from helpers.ranks import run_ranks
from helpers.stock_checkpoints import build_stock_chunks

from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.conversion.megatron.legacy_writer import write_legacy
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist

pytestmark = pytest.mark.both_versions


def to_layout(tp, pp, vpp):
    return Layout(tp, pp, vpp or 1)


def check_chunks(chunks, source, layout, rows):
    """Compare what a rank's modules hold with Hugging Face's weights, cut by hand."""
    from megatron.core import parallel_state

    tp, pp, vpp = layout
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    per_chunk = source.model.num_layers // (pp * (vpp or 1))
    for number, chunk in enumerate(chunks):
        wanted = {}
        for local in range(per_chunk):
            layer = (number * pp + pp_rank) * per_chunk + local
            for name, tensor in cut_layer(source, layer, tp, tp_rank).items():
                wanted[f"decoder.layers.{local}.{name}"] = tensor
        first = number == 0 and pp_rank == 0
        last = number == len(chunks) - 1 and pp_rank == pp - 1
        if first:
            wanted["embedding.word_embeddings.weight"] = "model.embed_tokens.weight"
        if last:
            wanted["decoder.final_layernorm.weight"] = source.tensors["model.norm.weight"]
            if not source.model.share_embeddings_and_output_weights:
                wanted["output_layer.weight"] = "lm_head.weight"
            elif not first:
                wanted["output_layer.weight"] = "model.embed_tokens.weight"
        for name, tensor in wanted.items():
            if isinstance(tensor, str):
                table = source.tensors[tensor]
                padded = torch.cat([table, table[-1:].repeat(rows - VOCAB, 1)])
                wanted[name] = padded.tensor_split(tp)[tp_rank]
        found = dict(chunk.named_parameters())
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            # Which type a norm has is the loading model's choice.
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def load_legacy(rank, folder, case, layout):
    from helpers.tiny_models import model_parallel

    tp, pp, vpp = layout
    source = make_source(Path(folder), case)
    rows = 8 * tp * -(-VOCAB // (8 * tp))
    with model_parallel(tp, pp, vpp):
        chunks = build_stock_chunks(source.model, layout, rows)
        name = f"mp_rank_{rank % tp:02d}" + (f"_{rank // tp:03d}" if pp > 1 else "")
        state = torch.load(
            f"{folder}/out/release/{name}/model_optim_rng.pt",
            map_location="cpu",
            weights_only=False,
        )
        assert state["checkpoint_version"] == 3.0
        assert state["args"].padded_vocab_size == rows
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(state["model" if vpp is None else f"model{number}"], strict=True)
        check_chunks(chunks, source, layout, rows)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("untied", (2, 2, 2)),
        pytest.param("tied", (2, 2, None), marks=pytest.mark.slow),
        pytest.param("tied", (1, 1, None), marks=pytest.mark.slow),
    ],
)
def test_legacy_shards_load_strictly(tmp_path, case, layout):
    write_legacy(make_source(tmp_path, case), tmp_path / "out", to_layout(*layout))
    run_ranks(layout[0] * layout[1], load_legacy, str(tmp_path), case, layout)


def load_torch_dist(rank, folder, case, layout):
    from helpers.tiny_models import model_parallel
    from megatron.core import dist_checkpointing

    from megatron_bitcpm.parallel.megatron_api import sharded_state_dict_of_chunks

    source, rows = make_source(Path(folder), case), 64
    with model_parallel(*layout):
        chunks = build_stock_chunks(source.model, layout, rows)
        state = sharded_state_dict_of_chunks(chunks)
        loaded = dist_checkpointing.load(state, f"{folder}/out/release")
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{number}"])
        check_chunks(chunks, source, layout, rows)


@pytest.mark.parametrize(
    ("case", "written", "layout"),
    [
        ("untied", (1, 1, None), (2, 2, 2)),
        pytest.param("tied", (2, 2, 2), (2, 2, None), marks=pytest.mark.slow),
        pytest.param("untied", (4, 2, None), (1, 1, None), marks=pytest.mark.slow),
    ],
)
def test_torch_dist_loads_at_any_layout(tmp_path, case, written, layout):
    write_torch_dist(make_source(tmp_path, case), tmp_path / "out", to_layout(*written))
    run_ranks(layout[0] * layout[1], load_torch_dist, str(tmp_path), case, layout)


def load_decoder(rank, folder, case, layout):
    from helpers.tiny_models import model_parallel

    from megatron_bitcpm.checkpoint.state import load_weights
    from megatron_bitcpm.config import ParallelConfig
    from megatron_bitcpm.models.decoder import Decoder, build_transformer_config
    from megatron_bitcpm.parallel.megatron_api import build_pipeline_chunks

    source, (tp, pp, vpp) = make_source(Path(folder), case), layout
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
    )
    config = build_transformer_config(source.model, parallel, torch.bfloat16)
    with model_parallel(*layout):
        chunks = build_pipeline_chunks(
            lambda **place: Decoder(config, source.model, 64, 32, **place)
        )
        load_weights(Path(folder) / "out" / "release", chunks)
        check_chunks(chunks, source, layout, 64)


@pytest.mark.parametrize("layout", [pytest.param((2, 2, 2), marks=pytest.mark.slow), (1, 1, None)])
def test_our_decoder_loads_minicpm(tmp_path, layout):
    write_torch_dist(make_source(tmp_path, "minicpm"), tmp_path / "out", Layout(2, 1))
    run_ranks(layout[0] * layout[1], load_decoder, str(tmp_path), "minicpm", layout)
