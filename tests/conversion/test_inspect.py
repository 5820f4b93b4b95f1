"""`inspect`: what a model is, by its tensors, against models made with known properties."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil

import pytest
import torch
from helpers.model_factory import random_tensors, tiny_model
from helpers.tiny_folders import make_folder
from helpers.trained_checkpoints import BASE
from safetensors.torch import load_file, save_file

from megatron_bitcpm import ops
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.conversion.infer_grid import infer_grid
from megatron_bitcpm.conversion.inspect import inspect
from megatron_bitcpm.conversion.inspect_text import render
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quant.grids import GRIDS
from megatron_bitcpm.quantizer import Quantizer


@pytest.fixture(autouse=True)
def one_thread():
    """Many small tensors: threads would only wait for each other."""
    torch.set_num_threads(1)  # restored after each test


RIGHT = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# What the folder carried instead: the 3B's dimensions.
WRONG = {
    **RIGHT,
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def make_tensors(group_size=None, grid="ternary", seed=0):
    """Return the tensors of RIGHT; group_size None leaves latents, else an int or by projection."""
    model = tiny_model("1B/16")
    tensors = random_tensors(model, 100, scale=0.02, seed=seed, order="layers_last")
    for name, tensor in tensors.items():
        short = name.split(".")[-2]
        if short.endswith("proj") and group_size is not None:
            size = group_size.get(short, -1) if isinstance(group_size, dict) else group_size
            size = tensor.shape[1] if size == -1 else size
            tensors[name] = ops.fake_quantize(tensor, size, 1e-5, grid)
    return tensors


def write(folder, tensors, config=RIGHT, stamp=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if stamp is not None:
        content = {"quantizer": stamp.stamp()}
        (folder / "bitcpm_quantizer.json").write_text(json.dumps(content))
    return folder


# -- architecture --------------------------------------------------------------------------------


def test_a_config_with_the_sizes_of_another_model(tmp_path):
    folder = write(tmp_path / "m", make_tensors(-1), WRONG)
    with pytest.raises(CheckpointError, match=r"missing tensors.*bitcpm inspect"):
        open_source(folder)
    before = (folder / "config.json").read_bytes()
    report = inspect(folder)
    found = {c["field"]: (c["config"], c["weights"]) for c in report["contradictions"]}
    assert found == {
        "hidden_size": (160, 128),
        "intermediate_size": (640, 384),
        "num_hidden_layers": (32, 2),
        "num_attention_heads": (32, 16),
    }
    assert (folder / "config.json").read_bytes() == before
    text = render(report)
    assert "hidden_size          160, in the tensors 128" in text
    assert "--fix-config corrects it" in text

    assert inspect(folder, fix_config=True)["fixed"] == "config.json.bak"
    assert (folder / "config.json.bak").read_bytes() == before
    assert json.loads((folder / "config.json").read_text()) == RIGHT
    assert open_source(folder).model.num_layers == 2
    again = inspect(folder, fix_config=True)
    assert (again["contradictions"], again["fixed"]) == ([], None)

    (folder / "config.json").write_bytes(before)
    assert inspect(folder, fix_config=True)["fixed"] == "config.json.bak2"
    assert (folder / "config.json.bak").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "head_dim", "evidence"),
    [
        ({}, 16, "head_dim of config.json"),
        ({"head_dim": 20, "rope_scaling": {"short_factor": [1.0] * 8}}, 16, "rotary factors"),
        ({"head_dim": None}, 16, "num_key_value_heads"),
        ({"head_dim": None, "num_key_value_heads": None, "hidden_size": 128}, 8, "hidden_size /"),
        ({"head_dim": 7, "num_key_value_heads": 3, "num_attention_heads": 7}, None, "do not tell"),
    ],
)
def test_how_head_dim_is_decided(changes, head_dim, evidence, tmp_path):
    config = {k: v for k, v in {**RIGHT, **changes}.items() if v is not None}
    report = inspect(write(tmp_path / "m", make_tensors(), config))
    assert report["architecture"].get("head_dim") == head_dim
    assert evidence in report["architecture"]["head_dim_from"]


def test_tied_embeddings_vocabulary_and_type(tmp_path):
    tensors = make_tensors(-1)
    del tensors["lm_head.weight"]
    config = {**RIGHT, "vocab_size": 73448, "torch_dtype": "float32"}
    folder = write(tmp_path / "m", tensors, config)
    fields = {c["field"]: c["weights"] for c in inspect(folder)["contradictions"]}
    assert fields == {"tie_word_embeddings": True, "vocab_size": 100, "torch_dtype": "bfloat16"}
    inspect(folder, fix_config=True)
    assert open_source(folder).model.share_embeddings_and_output_weights is True
    # in the newer name of the key too
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    inspect(folder, fix_config=True)
    fixed = json.loads((folder / "config.json").read_text())
    assert fixed["dtype"] == fixed["torch_dtype"] == "bfloat16"


def test_a_tied_model_that_stores_its_embedding_twice(tmp_path):
    tensors = make_tensors(-1)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for tied in (True, False, None):
        report = inspect(write(tmp_path / "m", tensors, {**RIGHT, "tie_word_embeddings": tied}))
        assert report["contradictions"] == []
        assert report["architecture"]["tie_word_embeddings"] is bool(tied)  # None: Llama's
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    report = inspect(write(tmp_path / "m", tensors, {**RIGHT, "tie_word_embeddings": True}))
    assert [c["field"] for c in report["contradictions"]] == ["tie_word_embeddings"]


def test_what_cannot_be_corrected(tmp_path):
    folder = write(tmp_path / "m", make_tensors(-1), None)
    assert "there is no config.json" in inspect(folder)["problems"]
    with pytest.raises(CheckpointError, match=r"--fix-config=.*has no config.json to correct"):
        inspect(folder, fix_config=True)
    tensors = make_tensors(-1)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.extra.weight"] = torch.ones(3).bfloat16()
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(128, 8).bfloat16()
    folder = write(tmp_path / "m", tensors, WRONG)
    problems = inspect(folder)["problems"]
    misfits = (
        "1 missing tensors: model.layers.1.mlp.up_proj.weight; "
        "1 unknown tensors: model.layers.0.extra.weight; "
        "1 misshapen tensors: model.layers.1.mlp.down_proj.weight is [128, 8], not [128, 384]"
    )
    assert misfits in problems
    text = render(inspect(folder))
    assert "--fix-config cannot correct it: config.json=" in text
    assert "--fix-config corrects it" not in text
    before = (folder / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="3 tensors fit no architecture") as caught:
        inspect(folder, fix_config=True)
    assert misfits in str(caught.value)
    assert (folder / "config.json").read_bytes() == before
    assert not (folder / "config.json.bak").exists()


@pytest.mark.parametrize("value", [128.0, "128", None, True])
def test_a_size_of_another_type(value, tmp_path):
    folder = write(tmp_path / "m", make_tensors(-1), {**RIGHT, "hidden_size": value})
    with pytest.raises(CheckpointError, match=r"hidden_size=.* --fix-config"):
        open_source(folder)
    wrong = [{"field": "hidden_size", "config": value, "weights": 128}]
    assert inspect(folder, fix_config=True)["contradictions"] == wrong
    assert json.loads((folder / "config.json").read_text()) == RIGHT
    open_source(folder)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("self_attn.q_proj", (256, 127)), ("self_attn.k_proj", (31, 128)), ("mlp.gate_proj", (9, 9))],
)
def test_one_damaged_tensor_is_blamed(name, shape, layer, tmp_path):
    tensors, full = make_tensors(-1), f"model.layers.{layer}.{name}.weight"
    good = list(tensors[full].shape)
    tensors[full] = torch.ones(shape).bfloat16()
    folder = write(tmp_path / "m", tensors)
    report = inspect(folder, fix_config=True)
    assert (report["contradictions"], report["fixed"]) == ([], None)
    odd = f"1 misshapen tensors: {full} is {list(shape)}, not {good}"
    assert odd in report["problems"]
    assert "--fix-config" not in render(report)
    # With a wrong config.json as well it says why that cannot be corrected.
    write(folder, tensors, WRONG)
    reason = f"config.json={folder}/config.json: 1 tensors fit no architecture: {odd}"
    assert f"cannot correct it: {reason}" in render(inspect(folder))
    with pytest.raises(CheckpointError, match="1 tensors fit no architecture"):
        inspect(folder, fix_config=True)


@pytest.mark.parametrize("number", [2, 4, 987654321])
def test_a_stray_tensor_makes_no_layer(number, tmp_path):
    tensors = make_tensors(-1)
    stray = f"model.layers.{number}.self_attn.q_proj.weight"
    tensors[stray] = tensors["model.layers.0.self_attn.q_proj.weight"].clone()
    report = inspect(write(tmp_path / "m", tensors), fix_config=True)
    assert (report["contradictions"], report["fixed"]) == ([], None)
    assert report["architecture"]["num_hidden_layers"] == 2
    assert report["problems"] == [f"layer {number} is incomplete, it holds only {stray}"]
    report = inspect(write(tmp_path / "m", tensors, {**RIGHT, "num_hidden_layers": 1}))
    reason = f"1 tensors fit no architecture: 1 unknown tensors: {stray}"
    assert reason in report["unfixable"]


def test_a_layer_that_was_lost(tmp_path):
    tensors = make_tensors(-1)
    tensors |= {n.replace("rs.1.", "rs.2."): t.clone() for n, t in tensors.items() if "rs.1." in n}
    tensors = {n: t for n, t in tensors.items() if "layers.1." not in n}
    report = inspect(write(tmp_path / "m", tensors, {**RIGHT, "num_hidden_layers": 3}))
    assert report["contradictions"] == []
    assert report["problems"][0].startswith("9 missing tensors: model.layers.1.")


def test_rotary_factors_of_another_head_dim(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 9, "long_factor": [1.0] * 8}
    report = inspect(write(tmp_path / "m", make_tensors(), {**RIGHT, "rope_scaling": rope}))
    assert "short_factor=(9 numbers): one for each pair of the 16 head" in report["problems"][0]


def test_what_the_decoder_cannot_compute_is_said(tmp_path):
    report = inspect(write(tmp_path / "m", make_tensors(), {**RIGHT, "attention_bias": True}))
    assert report["problems"][0].startswith("attention_bias=True: this decoder does not compute")
    report = inspect(write(tmp_path / "m", make_tensors(), {**RIGHT, "model_type": "gpt2"}))
    assert report["problems"][0].startswith("model_type=gpt2: this architecture is not supported")
    early = {k: v for k, v in RIGHT.items() if k != "model_type"}
    early |= {
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    }
    report = inspect(write(tmp_path / "m", make_tensors(), early))
    assert (report["architecture"]["model_type"], report["problems"]) == ("minicpm", [])


def test_a_stamp_of_other_dimensions(tmp_path):
    stamp = Quantizer(QuantConfig(group_size=7))
    report = inspect(write(tmp_path / "m", make_tensors(-1), stamp=stamp))
    assert report["problems"][0].startswith("the stamp does not fit the shapes of 14 tensors")
    assert "quant.group_size=7" in report["problems"][0]


@pytest.mark.parametrize("short", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"])
def test_an_empty_tensor(short, tmp_path):
    tensors, name = make_tensors(-1), f"{short}.weight"
    tensors[name] = tensors[name][:0]
    assert f"{name} is empty" in inspect(write(tmp_path / "m", tensors))["problems"]


def test_latents_that_were_quantised_already(tmp_path):
    folder = make_folder(tmp_path / "plain")
    latents = dataclasses.replace(
        open_source(folder), quantizer=Quantizer(QuantConfig()), form="latent"
    )
    write_folder(latents, tmp_path / "m", "latent")
    assert inspect(tmp_path / "m")["problems"] == []
    write_folder(open_source(tmp_path / "m"), tmp_path / "pseudo", "pseudo")
    shutil.copy(tmp_path / "pseudo" / "model.safetensors", tmp_path / "m")
    assert inspect(tmp_path / "m")["problems"][0].startswith("14 tensors are on a grid already")


def test_a_full_disk_leaves_the_config_as_it_was(tmp_path, monkeypatch):
    folder = write(tmp_path / "m", make_tensors(-1), WRONG)
    before = (folder / "config.json").read_bytes()

    def fail(*unused):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=r"config\.json=.*: cannot be written: No space left"):
        inspect(folder, fix_config=True)
    assert (folder / "config.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_something_else_than_a_llama(tmp_path):
    (tmp_path / "m").mkdir()
    save_file({"bert.embeddings": torch.ones(3)}, tmp_path / "m" / "model.safetensors")
    assert inspect(tmp_path / "m")["problems"] == [
        "there is no config.json",
        "the tensors are not those of a Llama or MiniCPM",
    ]


# -- grid and groups -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [8, 48, 96, -1])
def test_the_group_size_of_any_grid(grid, size, dtype):
    generator = torch.Generator().manual_seed(1)
    w = (torch.randn(40, 96, generator=generator) * 0.02).to(dtype)
    wq = ops.fake_quantize(w, 96 if size == -1 else size, 1e-5, grid)
    found = infer_grid(wq, 1e-5)
    assert found.weights_per_scale == (96 if size == -1 else size)
    # asym4 takes its -2 only where rounding leads there; without one it looks ternary
    name = found.grid.name
    assert name == grid or (grid, name) == ("asym4", "ternary")
    assert infer_grid(wq, 1e-5, grids=(GRIDS[grid],)).grid == GRIDS[grid]
    assert found.count.weights == w.numel()
    assert infer_grid(w, 1e-5) is None


def test_one_scale_for_a_whole_tensor():
    w = torch.randint(-1, 2, (16, 96)).bfloat16() * 0.0123
    assert infer_grid(w, 1e-5).weights_per_scale == 16 * 96
    w[3] = w[3] * 2
    assert infer_grid(w, 1e-5).weights_per_scale == 96
    w[3, 48:] = w[3, 48:] * 5  # no ratio of a grid
    assert infer_grid(w, 1e-5).weights_per_scale == 48
    # one value off, in a row that the search does not sample
    w[7, 50] = 0.5
    w[7, 51] = 0.25
    w[7, 52] = 0.125
    assert infer_grid(w, 1e-5) is None or infer_grid(w, 1e-5).weights_per_scale < 48


def test_an_unstamped_pseudo_quantised_folder(tmp_path):
    tensors = make_tensors({"o_proj": 128, "down_proj": 96})  # o and down with local scales
    report = inspect(write(tmp_path / "m", tensors))
    assert (report["form"], report["latents"]) == ("plain", None)
    assert report["projections"] == {
        "self_attn.q_proj": {-1: 2},
        "self_attn.k_proj": {-1: 2},
        "self_attn.v_proj": {-1: 2},
        "self_attn.o_proj": {128: 2},
        "mlp.gate_proj": {-1: 2},
        "mlp.up_proj": {-1: 2},
        "mlp.down_proj": {96: 2},
    }
    weights = torch.cat([t.flatten() for n, t in tensors.items() if "proj" in n])
    groups = 2 * (256 + 32 + 32 + 128 * 2 + 384 + 384 + 128 * 4)
    found = report["grids"]["ternary"]
    assert (found["tensors"], found["groups"]) == (14, groups)
    zero = float((weights == 0).float().mean())
    plus = float((weights > 0).float().mean())
    assert found["zero_fraction"] == pytest.approx(zero, abs=1e-6)
    entropy = -sum(p * math.log2(p) for p in (zero, plus, 1 - zero - plus))
    assert found["entropy_bits_per_weight"] == pytest.approx(entropy, abs=1e-5)
    packed = 2 + 32 * groups / weights.numel()
    assert found["packed_bits_per_weight"] == pytest.approx(packed)
    memory = report["memory"]
    assert memory["projections"]["stored_bytes"] == 2 * weights.numel()
    assert memory["projections"]["packed_bytes"] == pytest.approx(packed / 8 * weights.numel())
    assert memory["embedding"] == {
        "parameters": 12800,
        "stored_bytes": 25600,
        "packed_bytes": 25600,
    }
    assert memory["norms"]["parameters"] == 5 * 128
    text = render(report)
    assert "no stamp, but every projection is on the ternary grid" in text
    assert "mlp.down_proj        group size 96 (2 layers)" in text


def test_latents_say_their_quantisation_error(tmp_path):
    tensors = make_tensors()
    report = inspect(write(tmp_path / "m", tensors))
    assert (report["projections"], report["grids"]) == ({}, {})
    lost = total = 0.0
    for name, tensor in tensors.items():
        if "proj" in name:
            w = tensor.double()
            s = w.abs().mean(-1, keepdim=True)
            wq = (w / s).round().clamp(-1, 1) * s
            lost, total = lost + float((w - wq).square().sum()), total + float(w.square().sum())
    assert report["latents"]["tensors"] == 14
    assert report["latents"]["relative_quantization_error"] == pytest.approx(lost / total, rel=1e-3)
    assert "not on a grid, first model.layers.0" in render(report)
    assert "relative quantisation error" in render(report)


def test_layers_in_full_precision_beside_others(tmp_path):
    tensors = make_tensors(32)
    latents = make_tensors()
    tensors |= {n: t for n, t in latents.items() if ".layers.1." in n}
    report = inspect(write(tmp_path / "m", tensors))
    assert report["projections"]["mlp.up_proj"] == {32: 1}
    assert report["latents"]["tensors"] == 7
    assert report["latents"]["first"].startswith("model.layers.1.")
    quant = QuantConfig(group_size=32, full_precision_last_layers=1)
    report = inspect(write(tmp_path / "m", tensors, stamp=Quantizer(quant)))
    assert report["problems"] == []


def test_values_that_are_not_on_the_grid_of_the_stamp(tmp_path):
    for size, fine in ((-1, True), (64, True), (32, False)):
        folder = write(
            tmp_path / "m", make_tensors(size), stamp=Quantizer(QuantConfig(group_size=64))
        )
        report = inspect(folder)
        assert (report["form"], report["stamp"]["group_size"]) == ("pseudo", 64)
        assert (report["problems"] == []) is fine, report["problems"]
    assert (
        "14 tensors are not on the grid of the stamp, first model.layers."
        in (report["problems"][0])
    )


def test_a_latent_folder(tmp_path):
    stamp = Quantizer(QuantConfig(group_size=64, grid="five"))
    block = {"format_version": 1, "form": "latent", "quantizer": stamp.stamp()}
    tensors = make_tensors()
    report = inspect(write(tmp_path / "m", tensors, {**RIGHT, "bitcpm_quantizer": block}))
    assert (report["form"], report["stamp"]["grid"]) == ("latent", "five")
    # 3 bits for five codes, a float32 scale for every 64 weights
    weights = sum(t.numel() for n, t in tensors.items() if "proj" in n)
    assert report["memory"]["projections"]["packed_bytes"] == weights * (3 + 0.5) / 8
    assert "latents of a quantised model" in render(report)


def test_damaged_values(tmp_path):
    tensors = make_tensors(-1)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    tensors["model.layers.0.self_attn.q_proj.weight"].zero_()
    report = inspect(write(tmp_path / "m", tensors))
    assert "model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values" in report["problems"]
    assert "model.layers.0.self_attn.q_proj.weight holds only zeros" in report["problems"]


# -- other kinds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_single_file(suffix, tmp_path):
    path = tmp_path / f"w.{suffix}"
    torch.save(make_tensors(64), path) if suffix == "bin" else save_file(make_tensors(64), path)
    report = inspect(path)
    assert (report["kind"], report["architecture"]["hidden_size"]) == ("file", 128)
    assert report["projections"]["mlp.down_proj"] == {64: 2}
    assert report["dtypes"].keys() == {"bfloat16"}
    assert "file of tensors" in render(report)
    with pytest.raises(CheckpointError, match=r"has no config\.json to correct"):
        inspect(path, fix_config=True)


def test_a_folder_with_a_bin_and_its_config_as_the_argument(tmp_path):
    folder = write(tmp_path / "m", make_tensors(-1), WRONG)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    report = inspect(folder / "config.json")
    assert (report["kind"], len(report["contradictions"])) == ("hf", 4)


def test_a_run_of_the_trainer(trained):
    run = trained("tp1_untied")
    report = inspect(run.directory)
    assert (report["kind"], report["form"]) == ("torch_dist", "latent")
    architecture = report["architecture"]
    found = {
        ours: architecture[theirs]
        for ours, theirs in {
            "num_layers": "num_hidden_layers",
            "hidden_size": "hidden_size",
            "ffn_hidden_size": "intermediate_size",
            "num_attention_heads": "num_attention_heads",
            "num_query_groups": "num_key_value_heads",
        }.items()
    }
    assert found.items() <= BASE["model"].items()
    assert architecture["vocab_size"] == 300
    assert report["stamp"]["group_size"] == -1
    assert report["latents"]["tensors"] == 7 * BASE["model"]["num_layers"]
    assert "Megatron checkpoint (torch_dist)" in render(report)
