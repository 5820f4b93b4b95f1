"""Through Megatron and back: every value of every tensor, and what config.json means.

Models and expected values come from `released_models`, which knows nothing of the package.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.numpy_sums import abs_sums
from helpers.released_models import RELEASED, TINY, config_json, make_tensors, write_hf_folder
from safetensors.torch import load_file

from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.errors import CheckpointError

QUANTIZER = {"quant_type": "ternary", "group_size": -1}
UNTOUCHED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


def layout(tp=1, pp=1, vpp=None):
    return {
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "virtual_pipeline_parallel_size": vpp,
    }


def load_all(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for path in folder.glob("*.bin"):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def assert_bitwise(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def assert_same_meaning(folder, shape):
    """config.json says what the original one said; the rotary settings in transformers 4's form."""
    config, wanted = json.loads((folder / "config.json").read_text()), config_json(shape)
    rope, wanted_rope = config.pop("rope_scaling"), wanted.pop("rope_scaling")
    for key in ("rope_type", "short_factor", "long_factor"):
        assert rope[key] == wanted_rope[key]
    assert rope["original_max_position_embeddings"] == shape.original_positions
    for key in ("transformers_version", "auto_map"):
        wanted.pop(key, None)
    assert {key: config.get(key) for key in wanted} == wanted


def codes_of(tensors):
    return {name: t.sign().to(torch.int8) for name, t in tensors.items() if "_proj." in name}


def reference_codes(w):
    """Ternary codes with one scale for each row, by the definition."""
    w = w.float().numpy()
    scales = np.maximum(abs_sums(w, w.shape[1]) * np.float32(1 / w.shape[1]), np.float32(1e-5))
    return torch.from_numpy(np.clip(np.rint(w / scales), -1, 1).astype(np.int8))


DIST, LEGACY = "torch_dist", "legacy"
WAYS = {
    # size, kind of weight files, how many, checkpoints on the way
    "tied muP": ("0.5B", "safetensors", 1, [(DIST, layout(2, 2))]),
    "untied": ("1B", "safetensors", 3, [(LEGACY, layout(2, 2, 2))]),
    "ranks > key heads": ("3B", "bin", 1, [(DIST, layout(4)), (LEGACY, layout(2))]),
    "interleaved": ("3B", "safetensors", 1, [(DIST, layout(1, 2, 2)), (LEGACY, layout(1, 4))]),
    "untied muP": ("8B", "bin", 3, [(LEGACY, layout(1, 2)), (DIST, layout(2))]),
}


class TestRoundTrip:
    @pytest.mark.parametrize("way", WAYS)
    def test_bitwise(self, way, tmp_path):
        size, weights, shards, stops = WAYS[way]
        shape, tensors = TINY[size], make_tensors(TINY[size])
        here = start = write_hf_folder(tmp_path / "start", shape, tensors, weights, shards)
        for number, (kind, sizes) in enumerate(stops):
            there = tmp_path / f"{number}-{kind}"
            report = convert(here, there, format=kind, **sizes)
            assert report["verify"]["differing_values"] == 0
            here = there
        convert(here, tmp_path / "back", form="plain")
        assert_bitwise(load_all(tmp_path / "back"), tensors)
        assert_same_meaning(tmp_path / "back", shape)
        for name in UNTOUCHED:
            assert (tmp_path / "back" / name).read_bytes() == (start / name).read_bytes()

    def test_more_ranks_than_key_heads_are_refused_in_legacy_shards(self, tmp_path):
        start = write_hf_folder(tmp_path / "start", TINY["3B"], make_tensors(TINY["3B"]))
        with pytest.raises(CheckpointError, match=r"tensor.parallel.size=4: .*2 key"):
            convert(start, tmp_path / "out", format="legacy", **layout(4))
        assert not (tmp_path / "out").exists()

    def test_weight_files_of_both_kinds_and_any_number(self, tmp_path):
        tensors = make_tensors(TINY["8B"])
        here = write_hf_folder(tmp_path / "start", TINY["8B"], tensors, "bin", 3)
        for weights in ("safetensors", "bin"):
            there = tmp_path / weights
            report = convert(here, there, form="plain", weights=weights, max_shard_size="300KB")
            assert len(report["files"]) > 3
            assert_bitwise(load_all(there), tensors)
            here = there


class TestCodes:
    """The codes of a latent model are the same on every way to a pseudo-quantised folder."""

    @pytest.fixture(params=["3B", pytest.param("8B", marks=pytest.mark.slow)])
    def model(self, request, tmp_path):
        shape = TINY[request.param]
        tensors = make_tensors(shape, seed=3)
        return tmp_path, tensors, write_hf_folder(tmp_path / "start", shape, tensors)

    def test_they_are_those_of_the_definition(self, model):
        folder, tensors, start = model
        convert(start, folder / "pseudo", form="pseudo", **QUANTIZER)
        found = codes_of(load_all(folder / "pseudo"))
        assert len(found) == 4 * 7
        for name, codes in found.items():
            assert torch.equal(codes, reference_codes(tensors[name])), name

    def test_they_survive_every_way(self, model):
        folder, tensors, start = model
        convert(start, folder / "latent", form="latent", **QUANTIZER)
        convert(folder / "latent", folder / "dist", format="torch_dist", **layout(2, 2, 2))
        convert(folder / "dist", folder / "legacy", format="legacy", **layout(2))
        convert(folder / "legacy", folder / "latent2", form="latent")
        assert_bitwise(load_all(folder / "latent2"), tensors)
        convert(folder / "legacy", folder / "pseudo2", form="pseudo")
        found = load_all(folder / "pseudo2")
        wanted = {name: reference_codes(tensors[name]) for name in codes_of(tensors)}
        assert all(torch.equal(codes, wanted[name]) for name, codes in codes_of(found).items())
        # A pseudo-quantised model goes through Megatron as it is.
        convert(folder / "pseudo2", folder / "dist2", format="torch_dist", **layout(2))
        convert(folder / "dist2", folder / "pseudo3", form="pseudo")
        assert_bitwise(load_all(folder / "pseudo3"), found)


def test_folding_keeps_codes_and_multiplies_the_constants_in(tmp_path):
    shape = TINY["0.5B"]
    tensors = make_tensors(shape)
    start = write_hf_folder(tmp_path / "start", shape, tensors)
    convert(start, tmp_path / "carried", form="pseudo", **QUANTIZER)
    report = convert(start, tmp_path / "folded", form="pseudo", architecture="llama", **QUANTIZER)
    carried, folded = load_all(tmp_path / "carried"), load_all(tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", False)
    assert not {"scale_emb", "scale_depth", "dim_model_base"} & config.keys()
    factors = {
        "embed_tokens": 12.0,
        "o_proj": 1.4 / math.sqrt(4),
        "down_proj": 1.4 / math.sqrt(4),
        "lm_head": 256 / 64,
    }
    carried["lm_head.weight"] = carried["model.embed_tokens.weight"]
    assert folded.keys() == carried.keys()
    largest = 0.0
    for name, tensor in folded.items():
        factor = factors.get(name.split(".")[-2], 1.0)
        exact = carried[name].double() * factor
        # One rounding of an exact product to bfloat16's 8 bits.
        error = ((tensor.double() - exact).abs() / exact.abs().clamp(min=1e-30)).max()
        assert error <= (2**-8 if factor != 1 else 0), name
        largest = max(largest, float(error))
        if "_proj." in name:
            assert torch.equal(tensor.sign(), carried[name].sign()), name
    assert report["folding"]["largest_relative_rounding"] == pytest.approx(largest, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("size", RELEASED)
def test_released_shapes(size, tmp_path):
    """Through both formats at TP 2 x PP 2, and the codes; about 1 GB on disk at a time."""
    shape = RELEASED[size]
    tensors = make_tensors(shape)
    start = write_hf_folder(tmp_path / "start", shape, tensors, "safetensors", 2)
    convert(start, tmp_path / "dist", format="torch_dist", **layout(2, 2))
    convert(tmp_path / "dist", tmp_path / "legacy", format="legacy", **layout(1, 2))
    convert(
        tmp_path / "legacy", tmp_path / "back", form="plain", weights="bin", max_shard_size="300MB"
    )
    assert_bitwise(load_all(tmp_path / "back"), tensors)
    assert_same_meaning(tmp_path / "back", shape)
    convert(tmp_path / "legacy", tmp_path / "pseudo", form="pseudo", **QUANTIZER)
    for name, codes in codes_of(load_all(tmp_path / "pseudo")).items():
        assert torch.equal(codes, reference_codes(tensors[name])), name


@pytest.mark.slow
def test_more_ranks_than_key_heads_in_released_shapes(tmp_path):
    tensors = make_tensors(RELEASED["3B"])
    start = write_hf_folder(tmp_path / "start", RELEASED["3B"], tensors)
    convert(start, tmp_path / "dist", format="torch_dist", **layout(8))
    convert(tmp_path / "dist", tmp_path / "back", form="plain")
    assert_bitwise(load_all(tmp_path / "back"), tensors)
