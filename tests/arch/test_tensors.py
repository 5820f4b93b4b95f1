"""The map of tensors: its arithmetic worked by hand, and proof that a row of it is all it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.model_factory import tiny_model
from safetensors.torch import load_file, save_file

from megatron_bitcpm.arch import tensors
from megatron_bitcpm.arch.counts import count_parameters
from megatron_bitcpm.arch.hf_config import hf_config
from megatron_bitcpm.arch.model import megatron_shapes, shapes_of
from megatron_bitcpm.arch.tensors import (
    FAMILIES,
    LAYER_PREFIXES,
    LLAMA,
    Dimensions,
    Family,
    Part,
    Place,
    Run,
    TensorSpec,
    find_projection,
    find_tensor,
)
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.inspect import inspect
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.verify import verify
from megatron_bitcpm.errors import CheckpointError

BY_NAME = {spec.name: spec for spec in LLAMA}
QKV = BY_NAME["self_attention.linear_qkv.weight"]
GATE_UP = BY_NAME["mlp.linear_fc1.weight"]
PROJ = BY_NAME["self_attention.linear_proj.weight"]
NORM = BY_NAME["mlp.linear_fc1.layer_norm_weight"]
# Two groups of two query heads of two channels; rows of linear_qkv: q0 q1 k0 v0 q2 q3 k1 v1.
DIMS = Dimensions(hidden=4, heads=4, groups=2, head_dim=2, ffn=4, vocab=8)


def numbered(*shape: int) -> torch.Tensor:
    """A tensor whose values are all different."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


# -- arithmetic ------------------------------------------------------------------------------------


def test_runs():
    assert QKV.shape(DIMS) == (16, 4)
    assert QKV.runs(DIMS) == [
        Run(0, 0, 4),
        Run(1, 0, 2),
        Run(2, 0, 2),
        Run(0, 4, 4),
        Run(1, 2, 2),
        Run(2, 2, 2),
    ]
    assert GATE_UP.runs(DIMS) == [Run(0, 0, 4), Run(1, 0, 4)]
    assert NORM.runs(DIMS) == [Run(0, 0, 4)]


@pytest.mark.parametrize(
    ("spec", "tp_size", "rows"),
    [
        (QKV, 1, [[range(16)]]),
        (QKV, 2, [[range(8)], [range(8, 16)]]),
        # More ranks than query groups: the cut goes through a group.
        (QKV, 4, [[range(4)], [range(4, 8)], [range(8, 12)], [range(12, 16)]]),
        (GATE_UP, 1, [[range(4), range(4, 8)]]),
        (GATE_UP, 2, [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]),
        (GATE_UP, 4, [[range(n, n + 1), range(4 + n, 5 + n)] for n in range(4)]),
        (tensors.EMBEDDING, 2, [[range(4)], [range(4, 8)]]),
        (PROJ, 2, [[range(4)], [range(4)]]),
        (NORM, 2, [[range(4)], [range(4)]]),
    ],
)
def test_rows_of_ranks(spec, tp_size, rows):
    assert [spec.rank_rows(DIMS, tp_size, rank) for rank in range(tp_size)] == rows


def test_split():
    fused = numbered(16, 4)
    q, k, v = QKV.split(fused, DIMS)
    assert torch.equal(q, fused[[0, 1, 2, 3, 8, 9, 10, 11]])
    assert torch.equal(k, fused[[4, 5, 12, 13]])
    assert torch.equal(v, fused[[6, 7, 14, 15]])
    gate, up = GATE_UP.split(fused[:8], DIMS)
    assert torch.equal(gate, fused[:4]) and torch.equal(up, fused[4:8])
    # A value for each row is split like the rows.
    assert [part.tolist() for part in GATE_UP.split(torch.arange(8), DIMS)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("spec", [QKV, GATE_UP, PROJ, NORM], ids=lambda spec: spec.name)
def test_parts_are_cut_for_ranks_and_joined_again(spec, tp_size):
    full = numbered(*spec.shape(DIMS))
    parts, shards = spec.split(full, DIMS), []
    for rank in range(tp_size):
        rows = spec.rank_rows(DIMS, tp_size, rank)
        shard = torch.cat([spec.read_rows(parts.__getitem__, DIMS, these) for these in rows])
        assert torch.equal(shard, torch.cat([full[these.start : these.stop] for these in rows]))
        shards.append(shard.chunk(tp_size, 1)[rank] if spec.row_parallel else shard)
    assert torch.equal(spec.join_ranks(shards, DIMS), full)


def test_only_the_parts_that_hold_rows_are_read():
    read = []
    parts = QKV.split(numbered(16, 4), DIMS)

    def get(part: int) -> torch.Tensor:
        read.append(part)
        return parts[part]

    # Rows 5 to 9 by hand: the second row of k0, v0, the first two rows of q2.
    rows = QKV.read_rows(get, DIMS, range(5, 10))
    assert torch.equal(rows, torch.cat([parts[1][1:2], parts[2][:2], parts[0][4:6]]))
    assert read == [1, 2, 0]
    # Rows of one part are not copied.
    assert QKV.read_rows(get, DIMS, range(8, 12)).data_ptr() == parts[0][4:].data_ptr()


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hf", "megatron", "part", "layer"),
    [
        ("model.embed_tokens.weight", "embedding.word_embeddings.weight", 0, None),
        ("lm_head.weight", "output_layer.weight", 0, None),
        ("model.norm.weight", "decoder.final_layernorm.weight", 0, None),
        (
            "model.layers.12.self_attn.v_proj.weight",
            "decoder.layers.12.self_attention.linear_qkv.weight",
            2,
            12,
        ),
        ("model.layers.0.mlp.up_proj.weight", "decoder.layers.0.mlp.linear_fc1.weight", 1, 0),
        (
            "model.layers.3.post_attention_layernorm.weight",
            "decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
            0,
            3,
        ),
    ],
)
def test_names_in_both_formats(hf, megatron, part, layer):
    place = find_tensor(hf)
    assert (place.megatron, place.part, place.layer) == (megatron, part, layer)
    assert place.name("hf") == hf
    assert find_tensor(megatron, "megatron") == Place(place.spec, 0, layer)
    assert (find_projection(hf) is None) == ("proj" not in hf)


def test_a_norm_has_two_names_in_megatron():
    local = find_tensor("decoder.layers.1.pre_mlp_layernorm.weight", "megatron")
    assert local == Place(NORM, 0, 1)
    assert local.megatron == "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.model.norm.weight",
        "mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.up_proj.weight.1",
        "model.layers.-1.mlp.up_proj.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "model.layersX0.mlp.up_proj.weight",
    ],
)
def test_other_names_are_unknown(name):
    assert find_tensor(name) is None


# -- a row is all it takes -------------------------------------------------------------------------

# A vector that no rank cuts, and two fused weights whose rows are cut: part after part, and
# interleaved by query group.
GAIN = TensorSpec(
    "gain",
    "self_attention.core_attention.gain",
    (Part("queries", {"hf": "self_attn.gain", "toy": "g"}),),
)
MIX = TensorSpec(
    "projection",
    "mlp.linear_mix.weight",
    (
        Part("ffn", {"hf": "mlp.mix_a.weight", "toy": "ma"}),
        Part("hidden", {"hf": "mlp.mix_b.weight", "toy": "mb"}),
    ),
    "hidden",
    "rows",
)
WOVEN = TensorSpec(
    "woven",
    "self_attention.woven.weight",
    (
        Part("queries", {"hf": "self_attn.woven_a.weight", "toy": "wa"}),
        Part("keys", {"hf": "self_attn.woven_b.weight", "toy": "wb"}),
    ),
    "hidden",
    "rows",
    interleaved=True,
)
MODEL = tiny_model("map")
VOCAB = 40
# gain 16; mix (24 + 16) x 16; woven (16 + 8) x 16
ADDED = 2 * (16 + 640 + 384)


@pytest.fixture
def longer_map(monkeypatch):
    """The map with three more rows in the layers of a Llama, and with a format called toy."""
    monkeypatch.setitem(LAYER_PREFIXES, "toy", "block-{}/")
    for spec in tensors.all_specs():
        for part in spec.parts:
            monkeypatch.setitem(part.names, "toy", f"toy {part.names['hf']}")
    llama = (*LLAMA[:3], GAIN, MIX, WOVEN, *LLAMA[3:])
    monkeypatch.setitem(FAMILIES, "llama", Family("Llama", llama, "LlamaForCausalLM"))


def make_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Write a random model with what the map has, by means of the libraries; return its tensors."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    found = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes_of(MODEL, VOCAB).items()
    }
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(MODEL, "bfloat16", VOCAB)))
    return found


def test_more_rows_arrive_in_names_shapes_and_counts(longer_map):
    added = {
        "gain": (16,),
        "mix_a.weight": (24, 16),
        "mix_b.weight": (16, 16),
        "woven_a.weight": (16, 16),
        "woven_b.weight": (8, 16),
    }
    hf = shapes_of(MODEL, VOCAB, "hf")
    for layer in range(2):
        found = {
            name.rsplit("self_attn.")[-1].rsplit("mlp.")[-1]: shape
            for name, shape in hf.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        assert added.items() <= found.items()
    toy = shapes_of(MODEL, VOCAB, "toy")
    assert list(toy.values()) == list(hf.values())
    assert toy["block-1/g"] == (16,) and toy["block-0/wb"] == (8, 16)
    assert toy["toy lm_head.weight"] == (VOCAB, 16)
    megatron = megatron_shapes(MODEL, 128)
    assert megatron["decoder.layers.1.self_attention.core_attention.gain"] == (16,)
    assert megatron["decoder.layers.0.mlp.linear_mix.weight"] == (40, 16)
    assert find_tensor("block-1/wb", "toy") == Place(WOVEN, 1, 1)
    assert find_tensor("block-1/toy mlp.up_proj.weight", "toy") == Place(GATE_UP, 1, 1)
    assert find_tensor("model.layers.1.self_attn.gain") == Place(GAIN, 0, 1)
    assert find_projection("model.layers.1.self_attn.gain") is None
    assert find_projection("model.layers.1.mlp.mix_b.weight") == Place(MIX, 1, 1)


def test_more_rows_are_more_parameters(request):
    before = count_parameters(MODEL, VOCAB)
    request.getfixturevalue("longer_map")
    assert count_parameters(MODEL, VOCAB) == before + ADDED


def test_more_rows_are_converted(longer_map, tmp_path):
    wanted = make_folder(tmp_path / "in")
    convert(
        tmp_path / "in",
        tmp_path / "dist",
        format="torch_dist",
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
    )
    convert(tmp_path / "dist", tmp_path / "legacy", format="legacy", tensor_parallel_size=2)
    convert(tmp_path / "legacy", tmp_path / "out", form="plain")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    # A rank of Megatron has all of the vector, and its rows of the fused weights.
    shard = torch.load(
        tmp_path / "legacy/release/mp_rank_01/model_optim_rng.pt", weights_only=False
    )["model"]
    layer = "decoder.layers.1."
    hf = {
        name.removeprefix("model.layers.1."): tensor
        for name, tensor in wanted.items()
        if name.startswith("model.layers.1.")
    }
    assert torch.equal(shard[layer + GAIN.name], hf["self_attn.gain"])
    mixed = torch.cat([hf["mlp.mix_a.weight"][12:], hf["mlp.mix_b.weight"][8:]])
    assert torch.equal(shard[layer + MIX.name], mixed)
    second_group = [hf["self_attn.woven_a.weight"][8:], hf["self_attn.woven_b.weight"][4:]]
    assert torch.equal(shard[layer + WOVEN.name], torch.cat(second_group))


def test_more_projections_are_quantised(longer_map, tmp_path):
    wanted = make_folder(tmp_path / "in")
    convert(
        tmp_path / "in",
        tmp_path / "pseudo",
        form="pseudo",
        quant_type="ternary",
        group_size=-1,
        force=True,
    )
    assert verify(tmp_path / "pseudo")["ternary_tensors"] == 2 * (7 + 2)
    found = load_file(tmp_path / "pseudo" / "model.safetensors")
    name = "model.layers.1.mlp.mix_b.weight"
    assert all(len(row.abs().unique()) <= 2 for row in found[name])
    assert torch.equal(
        found["model.layers.1.self_attn.gain"], wanted["model.layers.1.self_attn.gain"]
    )


def test_more_rows_are_inspected(longer_map, tmp_path):
    wanted = make_folder(tmp_path / "in")
    report = inspect(tmp_path / "in")
    assert report["problems"] == []
    assert report["parameters"] == sum(tensor.numel() for tensor in wanted.values())
    assert report["memory"]["other"]["parameters"] == 2 * (16 + 384)
    # q, k, v, o; gate, up, down; mix
    per_layer = (16 + 8 + 8 + 16) * 16 + 3 * 24 * 16 + 40 * 16
    assert report["memory"]["projections"]["parameters"] == 2 * per_layer


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.gain", "model.layers.0.self_attn.woven_b.weight"]
)
def test_a_row_that_a_model_lacks_is_named(longer_map, tmp_path, name):
    wanted = make_folder(tmp_path / "in")
    del wanted[name]
    save_file(wanted, tmp_path / "in" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 missing tensors: {name}"):
        open_source(tmp_path / "in")
    assert f"1 missing tensors: {name}" in inspect(tmp_path / "in")["problems"]


def test_a_row_that_the_map_lacks_is_named(tmp_path):
    wanted = make_folder(tmp_path / "in")
    wanted["model.layers.1.self_attn.gain"] = torch.ones(16)
    save_file(wanted, tmp_path / "in" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unknown tensors: model\.layers\.1\.self_attn\.g"):
        open_source(tmp_path / "in")
