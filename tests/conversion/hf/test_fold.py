"""Folding MiniCPM into a Llama: the right factors on the right tensors, codes untouched."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.numpy_ternary import fake_quantize
from helpers.tiny_folders import HIDDEN, LAYERS, MUP, load_all, make_folder, make_state, same_bits

from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.hf.fold import fold
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError

FACTORS = {
    "embed_tokens": MUP["scale_emb"],
    "o_proj": MUP["scale_depth"] / math.sqrt(LAYERS),
    "down_proj": MUP["scale_depth"] / math.sqrt(LAYERS),
    "lm_head": MUP["dim_model_base"] / HIDDEN,
}


def wanted_factor(name: str) -> float:
    return next((factor for part, factor in FACTORS.items() if part in name), 1.0)


def round_once(values, factor: float, dtype: torch.dtype):
    """The float32 product rounded to the dtype."""
    return (values.float() * torch.tensor(factor, dtype=torch.float32)).to(dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tensor_has_its_factor(tied, dtype, tmp_path):
    state = make_state(tied, dtype)
    source = fold(open_source(make_folder(tmp_path / "in", state, minicpm=True)))
    assert source.model.architecture == "llama"
    assert not source.model.share_embeddings_and_output_weights
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    assert source.shapes().keys() == state.keys()
    for name, tensor in state.items():
        wanted = round_once(tensor, wanted_factor(name), dtype)
        assert same_bits(source.tensor(name), wanted), name
        assert source.dtype(name) is dtype
    exact = {name: tensor.double() * wanted_factor(name) for name, tensor in state.items()}
    rounded = max(
        float(((source.tensor(name).double() - value) / value).abs().max())
        for name, value in exact.items()
    )
    assert max(source.rounding.values()) == pytest.approx(rounded, rel=1e-3, abs=2e-7)


@pytest.mark.parametrize("grid", ["ternary", "asym4", "half_sym4", "int_sym4", "five"])
@pytest.mark.parametrize("group_size", [16, -1, "tensor"])
def test_codes_survive(grid, group_size, tmp_path):
    state = make_state()
    folder = make_folder(tmp_path / "in", state, minicpm=True)
    report = convert(
        folder,
        tmp_path / "out",
        architecture="llama",
        quant_type=grid,
        group_size=group_size,
        force=True,
    )
    assert report["verify"]["ternary_tensors"] == 7 * LAYERS
    found = load_all(tmp_path / "out")
    for name, latent in state.items():
        if "_proj" not in name:
            continue
        shape = (1, -1) if group_size == "tensor" else latent.shape
        size = -1 if group_size == "tensor" else group_size
        if group_size == "tensor" and grid == "ternary":
            continue  # its sum is one of rows' sums: not that of a single long row
        wanted = fake_quantize(latent.reshape(shape), size, 1e-5, grid).reshape(latent.shape)
        assert same_bits(found[name], round_once(wanted, wanted_factor(name), latent.dtype)), name
        assert torch.equal(found[name].sign(), wanted.sign())


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e-39, torch.bfloat16), (1e-7, torch.float16), (3e38, torch.float32)]
)
def test_values_that_leave_the_type_are_refused(value, dtype, tmp_path):
    state = make_state(dtype=dtype)
    name = "model.embed_tokens.weight" if value > 1 else "lm_head.weight"
    # An odd multiple of the smallest number has no half.
    state[name][3, 2] = value if value > 1 else torch.finfo(dtype).smallest_normal / 8
    state[name][3, 3] = value if value > 1 else 3 * _smallest(dtype)
    source = fold(open_source(make_folder(tmp_path / "in", state, minicpm=True)))
    with pytest.raises(CheckpointError, match=rf"{name} x .* cannot hold"):
        source.tensor(name)


def _smallest(dtype: torch.dtype) -> float:
    integers = torch.int16 if dtype.itemsize == 2 else torch.int32
    return float(torch.tensor([1], dtype=integers).view(dtype)[0])


@pytest.mark.parametrize("stamped", [False, True])
def test_latents_are_not_folded(stamped, tmp_path):
    folder = make_folder(tmp_path / "in", minicpm=True)
    quantizer = {"quant_type": "ternary", "group_size": -1, "force": True}
    if stamped:
        convert(folder, tmp_path / "latent", form="latent", **quantizer)
        folder, quantizer = tmp_path / "latent", {}
    with pytest.raises(CheckpointError, match="architecture=llama: latent weights are not folded"):
        convert(folder, tmp_path / "out", form="latent", architecture="llama", **quantizer)
    assert not (tmp_path / "out").exists()
