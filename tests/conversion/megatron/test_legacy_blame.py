"""Legacy shards that do not agree: the message names the odd one, or both where nothing tells."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.megatron_models import make_source
from helpers.stock_checkpoints import edit, write_stock

from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.megatron.legacy_writer import write_legacy
from megatron_bitcpm.conversion.megatron.open import open_megatron
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
from megatron_bitcpm.errors import CheckpointError

pytestmark = pytest.mark.both_versions
FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
NORM = "decoder.layers.0.input_layernorm.weight"


def refuse(folder, message, reader=open_megatron):
    with pytest.raises(CheckpointError, match=message) as caught:
        source = reader(folder)
        for name in source.shapes():
            source.tensor(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def drop(shard):
    del shard["model"][FC2]


def add(shard):
    shard["model"]["decoder.layers.0.extra.weight"] = torch.ones(3)


def shorten(shard):
    shard["model"][FC2] = shard["model"][FC2][:-1].clone()


def spoil_norm(shard):
    shard["model"][NORM] = torch.zeros(32)


def other_model(shard):
    shard["args"].rotary_base += 1


DAMAGES = {
    "dropped": (drop, "linear_fc2.weight is"),
    "added": (add, "extra.weight is"),
    "shorter": (shorten, "linear_fc2.weight is"),
    "norm": (spoil_norm, "layer_norm_weight"),
    "arguments": (other_model, "model and layout of the arguments"),
}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_odd_one_of_four_is_named(tmp_path, damage, rank):
    stages = [(0, 1, 2, 3)]
    folder = write_stock(make_source(tmp_path), tmp_path / "run", tp=4, pp=1, stages=stages)
    change, message = DAMAGES[damage]
    edit(folder, f"mp_rank_{rank:02d}", change)
    error = refuse(folder, message)
    assert f"mp_rank_{rank:02d}/model_optim_rng.pt: " in error
    assert error.count("mp_rank_") == 1
    assert "most ranks" in error


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "arguments"])
def test_of_two_both_are_named(tmp_path, damage, rank):
    folder = write_stock(make_source(tmp_path), tmp_path / "run")
    change, message = DAMAGES[damage]
    edit(folder, f"mp_rank_{rank:02d}_000", change)
    error = refuse(folder, message)
    assert "mp_rank_00_000/model_optim_rng.pt" in error
    assert "mp_rank_01_000/model_optim_rng.pt" in error
    assert "One of them is damaged" in error


@pytest.mark.parametrize("name", ["mp_rank_00_000", "mp_rank_01_001"])
@pytest.mark.parametrize("key", ["model0", "model1"])
def test_a_virtual_stage_is_missing(tmp_path, name, key):
    write_legacy(make_source(tmp_path), tmp_path / "out", Layout(2, 2, 2))
    path = tmp_path / "out" / "release" / name / "model_optim_rng.pt"
    shard = torch.load(path, weights_only=False)
    del shard[key]
    torch.save(shard, path)
    error = refuse(tmp_path / "out", "number of virtual stages 1, on most ranks 2")
    assert f"{name}/model_optim_rng.pt: " in error


def test_a_surplus_shard_is_named(tmp_path):
    folder = write_stock(make_source(tmp_path), tmp_path / "run") / "iter_0000007"
    shutil.copytree(folder / "mp_rank_01_001", folder / "mp_rank_02_001")
    message = r"mp_rank_02_000/model_optim_rng\.pt is missing, beside mp_rank_02_001\. .*remove "
    refuse(folder, message)
    (folder / "mp_rank_02_001").rename(folder / "mp_rank_01_002")
    refuse(folder, r"mp_rank_00_002/model_optim_rng\.pt is missing, beside mp_rank_01_002\.")


@pytest.mark.parametrize("kind", ["legacy", "torch_dist"])
def test_both_16_bit_types_are_refused_before_anything_is_written(tmp_path, kind):
    source = make_source(tmp_path)
    for key, tensor in source.tensors.items():
        if "gate_proj" in key or "up_proj" in key:
            source.tensors[key] = tensor.half()
    write, reader = {
        "legacy": (write_legacy, open_megatron),
        "torch_dist": (write_torch_dist, open_megatron),
    }[kind]
    write(source, tmp_path / "in", Layout(2, 2))
    message = r"layers\.3\.mlp\.linear_fc1\.weight: of type float16 among 14 of bfloat16"
    refuse(tmp_path / "in", message, reader)
    with pytest.raises(CheckpointError, match="use another one") as caught:
        convert(tmp_path / "in", tmp_path / "out", form="plain")
    assert str(tmp_path / "in") in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [write_legacy, write_torch_dist])
def test_projections_that_are_fused_have_one_type(tmp_path, write):
    source = make_source(tmp_path)
    key = "model.layers.1.self_attn.k_proj.weight"
    source.tensors[key] = source.tensors[key].float()
    with pytest.raises(CheckpointError, match=r"fuses differ in type: .*1\.self_attn\.k_proj.*t32"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out" / "release").exists()


@pytest.mark.parametrize(("tp", "rows"), [(1, 64), (2, 128), (4, 256)])
def test_the_vocabulary_is_padded_for_each_tensor_rank(tmp_path, tp, rows):
    """Megatron pads to the product; the least common multiple would be 64 rows each time."""
    source = make_source(tmp_path, make_vocab_size_divisible_by=64)
    assert write_legacy(source, tmp_path / "out", Layout(tp))["padded_vocab_size"] == rows
    path = tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    shard = torch.load(path, weights_only=False)
    assert shard["args"].padded_vocab_size == rows
    assert shard["model"]["embedding.word_embeddings.weight"].shape == (rows // tp, 32)
