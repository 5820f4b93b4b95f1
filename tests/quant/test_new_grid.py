"""A new grid is one row of `quant.grids.GRIDS`: everything that quantises or reads follows it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from helpers.model_factory import random_tensors, tiny_model
from safetensors.torch import load_file, save_file

from megatron_bitcpm import ops
from megatron_bitcpm.arch.hf_config import hf_config
from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.infer_grid import infer_grid
from megatron_bitcpm.conversion.inspect import inspect
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.verify import verify
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quant.grids import GRIDS, Grid
from megatron_bitcpm.quantizer import Quantizer

WIDE = Grid("wide", (-4, -1, 0, 1, 4), 1.0, "abs_max", 4.0)
MODEL = tiny_model("grid")
VOCAB = 40
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """The row; no compiled kernel knows it."""
    before = ops.backend_report()["requested"]
    monkeypatch.setitem(GRIDS, "wide", WIDE)
    ops.use_backend("reference")
    yield
    ops.use_backend(before)


def random_weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(0.1).bfloat16()


@pytest.fixture
def latent(tmp_path):
    """A checkpoint of Megatron whose latents a quantiser with the new grid trained."""
    plain = tmp_path / "plain"
    plain.mkdir()
    tensors = random_tensors(MODEL, VOCAB, scale=0.1)
    save_file(tensors, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(hf_config(MODEL, "bfloat16", VOCAB)))
    quantizer = Quantizer(QuantConfig(grid="wide", group_size=16), tp_size=2)
    source = dataclasses.replace(open_source(plain), quantizer=quantizer, form="latent")
    write_torch_dist(source, tmp_path / "latent")
    return tmp_path / "latent"


def test_it_is_a_setting():
    assert QuantConfig(grid="wide").grid == "wide"
    with pytest.raises(ValueError, match=r"must be one of ternary, .*, five, wide"):
        QuantConfig(grid="wider")


def test_operators_on_numbers_worked_by_hand():
    # Scale 8 / 4 = 2: levels 0, 2 and 8, midpoints 1 and 5, where the smaller magnitude wins.
    w = torch.tensor([[8.0, 5.25, 5.0, 1.25, 1.0, 0.0, -0.75, -5.25]])
    codes, scales = ops.quantize(w, -1, 1e-5, "wide")
    assert (codes.tolist(), scales.tolist()) == ([[4, 4, 1, 1, 0, 0, 0, -4]], [[2.0]])
    levels = [[8.0, 8.0, 2.0, 2.0, 0.0, 0.0, 0.0, -8.0]]
    assert ops.fake_quantize(w, -1, 1e-5, "wide").tolist() == levels
    assert ops.fake_quantize_with_scales(w, scales, "wide").tolist() == levels


@pytest.mark.parametrize("group_size", [16, -1, "tensor"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_quantizer(group_size, tp_size):
    w, spec = random_weight(24, 64), find_projection(DOWN).spec
    quantizer = Quantizer(QuantConfig(grid="wide", group_size=group_size), tp_size)
    codes, scales = quantizer.codes_scales(w, spec)
    assert set(codes.unique().tolist()) == {-4, -1, 0, 1, 4}
    values = quantizer.values(w, spec)
    assert torch.equal(codes * scales.repeat_interleave(64 // scales.shape[1], 1), values.float())
    assert Quantizer.from_stamp(quantizer.stamp(), "here") == quantizer


def test_the_search_finds_it():
    found = infer_grid(ops.fake_quantize(random_weight(24, 64), 16, 1e-5, "wide"), 1e-5)
    assert (found.grid, found.weights_per_scale) == (WIDE, 16)


def test_conversion_verification_inspection_and_model_card(latent, tmp_path):
    folder = tmp_path / "pseudo"
    report = convert(latent, folder, form="pseudo")
    assert (report["input_form"], report["form"]) == ("latent", "pseudo")
    source = open_source(latent)
    found = load_file(folder / "model.safetensors")
    spec = find_projection(DOWN).spec
    values = source.quantizer.values(source.tensor(DOWN).contiguous(), spec)
    assert torch.equal(found[DOWN], values)
    assert not torch.equal(found[DOWN], source.tensor(DOWN))

    verified = verify(folder, latent)
    assert (verified["grid"], verified["ternary_tensors"]) == ("wide", 14)
    assert verified["differing_codes"] == verified["differing_scales"] == 0
    assert verified["packed_bits_per_weight"] == 3 + 32 / 16
    codes = torch.cat([source.codes_scales(n)[0].flatten() for n in source.quantized_tensors()])
    assert verified["zero_fraction"] == float((codes == 0).double().mean())

    inspected = inspect(folder)
    assert inspected["problems"] == []
    assert list(inspected["grids"]) == ["wide"]
    assert inspected["grids"]["wide"]["zero_fraction"] == verified["zero_fraction"]
    (folder / "bitcpm_quantizer.json").unlink()
    assert list(inspect(folder)["grids"]) == ["wide"]

    card = (folder / "README.md").read_text()
    assert "one of -4 s, -s, 0, s, 4 s, where s is" in card
    assert "# Quantised Llama" in card and "megatron-bitcpm, wide]" in card


def test_values_of_another_grid_are_noticed(latent, tmp_path):
    convert(latent, tmp_path / "pseudo", form="pseudo")
    path = tmp_path / "pseudo" / "model.safetensors"
    tensors = load_file(path)
    group = tensors[DOWN][3, :16]
    group[group.abs() == group.abs().max()] *= 0.5  # levels 1 and 2, those of grid five
    save_file(tensors, path)
    message = f"{DOWN} is not on the wide grid: row 3, group 0 of 16 inputs holds "
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "pseudo")
