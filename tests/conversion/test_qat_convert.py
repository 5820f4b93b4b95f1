"""The cards' command: only the projections change, to what training multiplied with."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.numpy_sums import abs_sums
from helpers.numpy_ternary import codes_from_scales, fake_quantize, level_bits, to_tensor
from helpers.tiny_folders import LAYERS, PROJECTIONS, load_all, make_folder, make_state, same_bits
from safetensors.torch import load_file, save_file

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion import qat_convert as qat_module
from megatron_bitcpm.conversion.convert import convert as convert_folder
from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.conversion.infer_grid import lies_on_grid
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.qat_convert import qat_convert
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.quant.reciprocal import fake_quantize_reciprocal
from megatron_bitcpm.quantizer import Quantizer

UP = "model.layers.1.mlp.up_proj.weight"
TOOL = Path(__file__).parents[2] / "tools" / "qat-convert.py"


def save(path: Path, state: dict) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def load(path: Path) -> dict:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def convert(path: Path, output: Path, *settings, force: bool = True, **named):
    settings = settings or ("ternary", -1)
    return qat_convert(path, output, *settings, force=force, **named)


def with_quantizer(source, **quant):
    return dataclasses.replace(source, quantizer=Quantizer(QuantConfig(**quant)), form="latent")


# -- what changes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["out.bin", "out.safetensors"])
@pytest.mark.parametrize("name", ["in.bin", "in.safetensors"])
def test_only_projections_change(name, to, tmp_path):
    state = make_state()
    # Not of the seven, whatever it is called.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    state["model.layers.0.mlp.gate_proj.bias"] = torch.rand(96).half()
    state["model.position_ids"] = torch.arange(9)
    report = convert(save(tmp_path / name, state), tmp_path / to)
    found = load(tmp_path / to)
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        changes = key.endswith("_proj.weight")
        wanted = fake_quantize(tensor) if changes else tensor
        assert same_bits(found[key], wanted), key
        assert not changes or not torch.equal(tensor, wanted)
    assert report["projections"] == 7 * LAYERS
    assert report["other_tensors"] == len(state) - 7 * LAYERS


@pytest.mark.parametrize(
    ("quant_type", "group_size"),
    [("ternary", 16), ("asym4", -1), ("half_sym4", 16), ("int_sym4", 32), ("five", "16")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_grids_and_types(quant_type, group_size, dtype, tmp_path):
    state = make_state(dtype=dtype)
    path = save(tmp_path / "in.bin", state)
    report = convert(path, tmp_path / "out.bin", quant_type, group_size)
    assert "other_numerics" not in report or dtype is torch.float32
    for key, tensor in load(tmp_path / "out.bin").items():
        wanted = (
            fake_quantize(state[key], int(group_size), 1e-5, quant_type)
            if "_proj" in key
            else state[key]
        )
        assert same_bits(tensor, wanted), key


@pytest.mark.parametrize("grid", ["ternary", "five"])
def test_one_scale_per_projection(grid, tmp_path):
    path = save(tmp_path / "in.bin", make_state())
    convert(path, tmp_path / "out.bin", grid, "tensor")
    state = make_state()
    for key, tensor in load(tmp_path / "out.bin").items():
        if "_proj" not in key:
            assert same_bits(tensor, state[key])
            continue
        assert len(tensor.abs().unique()) == (2 if grid == "ternary" else 3)
        w = state[key].float().numpy()
        statistic = np.abs(w).max() / np.float32(2)
        if grid == "ternary":  # the sum over the rows' sums
            total = abs_sums(abs_sums(w, w.shape[1]).reshape(1, -1), len(w))
            statistic = total[0, 0] * (np.float32(1) / np.float32(w.size))
        scales = np.full((len(w), 1), statistic, np.float32)
        bits = level_bits(codes_from_scales(w, scales, grid), scales, tensor.dtype, grid)
        assert same_bits(tensor, to_tensor(bits, tensor.dtype)), key


def test_the_input_is_not_written_to(tmp_path):
    # A mapped file is private memory of the process: the file alone would not show it.
    folder = make_folder(tmp_path / "in", make_state(dtype=torch.float32))
    source = with_quantizer(open_source(folder))
    write_folder(source, tmp_path / "out", "pseudo")
    for name, tensor in make_state(dtype=torch.float32).items():
        assert same_bits(source.tensor(name), tensor), name


def test_transposed_tensors(tmp_path):
    state = make_state()
    stored = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}
    path = save(tmp_path / "in.bin", stored)
    convert(path, tmp_path / "out.bin", "ternary", 16)
    assert same_bits(load(tmp_path / "out.bin")[UP], fake_quantize(state[UP], 16))


def test_tied_tensors_stay_one(tmp_path):
    state = make_state(tied=True)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    convert(save(tmp_path / "in.bin", state), tmp_path / "out.bin")
    found = load(tmp_path / "out.bin")
    names = ("lm_head.weight", "model.embed_tokens.weight")
    assert len({found[name].data_ptr() for name in names}) == 1
    once, twice = ((tmp_path / f).stat().st_size for f in ("in.bin", "out.bin"))
    assert abs(once - twice) < 20_000
    # Safetensors has no such thing: both are written.
    convert(tmp_path / "in.bin", tmp_path / "out.safetensors")
    found = load(tmp_path / "out.safetensors")
    assert all(same_bits(found[name], state[name]) for name in names)


def test_another_name_of_a_projection_keeps_the_latents(tmp_path):
    state = make_state()
    state["other.weight"] = state[UP]
    convert(save(tmp_path / "in.bin", state), tmp_path / "out.bin")
    found = load(tmp_path / "out.bin")
    assert same_bits(found["other.weight"], state[UP])
    assert same_bits(found[UP], fake_quantize(state[UP]))


# -- numerics --------------------------------------------------------------------------------------


def test_reciprocal_by_hand():
    # Mean 0.75 in bfloat16, 1 / 0.75 rounds to 1.3359375; times 0.375 is 0.50098, which rounds to
    # 0.5: code 0. Exactly 0.375 / 0.75 = 0.5: code 0 too. 0.376953125 * 1.3359375 rounds to 0.504.
    w = torch.tensor([[0.375, -0.376953125, 1.1240234375, 1.1240234375]]).bfloat16()
    sums = torch.tensor([[3.0]])
    wq = fake_quantize_reciprocal(w, sums, 4, 1e-5)
    assert wq.dtype is torch.bfloat16
    assert wq.tolist() == [[0.0, -0.75, 0.75, 0.75]]
    assert not torch.signbit(fake_quantize_reciprocal(-w, sums, 4, 1e-5)[0, 0])
    zero = torch.zeros(2, 4).bfloat16()
    assert fake_quantize_reciprocal(zero, torch.zeros(2, 1), 4, 1e-5).tolist() == [[0.0] * 4] * 2
    w[0, 1] = float("nan")
    nan = torch.tensor([[float("nan")]])
    assert fake_quantize_reciprocal(w, nan, 4, 1e-5).isnan().all()
    with pytest.raises(BitcpmError, match=r"needs bfloat16 or float32 weights, not torch\.float16"):
        fake_quantize_reciprocal(w.half(), sums, 4, 1e-5)


def reciprocal_scalar(w: torch.Tensor) -> torch.Tensor:
    """One value at a time, with a rounding to bfloat16 after each operation."""

    def bf16(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float32).bfloat16())

    out = torch.empty_like(w)
    for r, row in enumerate(w):
        total = float(abs_sums(row.view(1, -1).float().numpy(), len(row))[0, 0])
        mean = bf16(float(torch.tensor(total) * torch.tensor(1 / len(row))))
        inverse = bf16(1 / max(mean, bf16(1e-5)))
        for i, value in enumerate(row.tolist()):
            scaled = bf16(value * inverse)
            out[r, i] = max(-1, min(1, round(scaled))) * max(mean, bf16(1e-5))
    return out


def test_reciprocal_numerics_and_the_count_of_the_others(tmp_path):
    state = make_state()
    path = save(tmp_path / "in.bin", state)
    fp32 = convert(path, tmp_path / "fp32.bin")
    other = convert(path, tmp_path / "other.bin", numerics="bf16_reciprocal")
    a, b = load(tmp_path / "fp32.bin"), load(tmp_path / "other.bin")
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(b[name], reciprocal_scalar(state[name]))
    changed = sum(int((a[n].sign() != b[n].sign()).sum()) for n in a if "_proj" in n)
    assert fp32["changed_codes"] == other["changed_codes"] == changed > 0
    assert (fp32["other_numerics"], other["other_numerics"]) == ("bf16_reciprocal", "fp32")
    assert fp32["changed_fraction"] == pytest.approx(changed / fp32["weights"])


# -- stamps and folders ----------------------------------------------------------------------------


@pytest.fixture
def latent(tmp_path):
    """A latent folder with a stamp that leaves the first layer in full precision."""
    source = with_quantizer(
        open_source(make_folder(tmp_path / "plain")),
        group_size=16,
        full_precision_first_layers=1,
        eps=1e-4,
    )
    write_folder(source, tmp_path / "latent", "latent")
    return tmp_path / "latent"


def test_a_stamp_beside_the_file_counts(latent, tmp_path):
    path, state = latent / "model.safetensors", make_state()
    report = convert(path, tmp_path / "out.bin", "ternary", 16, force=False)
    assert report["stamped"]
    assert "other_numerics" not in report
    for name, tensor in load(tmp_path / "out.bin").items():
        on_grid = "_proj" in name and "layers.1." in name
        wanted = fake_quantize(state[name], 16, 1e-4) if on_grid else state[name]
        assert same_bits(tensor, wanted), name
    for settings, message in (
        (("ternary", -1), "group_size=-1: the model was trained with 16"),
        (("five", 16), "quant_type=five: the model was trained with ternary"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(path, tmp_path / "other.bin", *settings)
    with pytest.raises(CheckpointError, match=r"numerics=bf16_reciprocal: .* trained with fp32"):
        convert(path, tmp_path / "other.bin", "ternary", 16, numerics="bf16_reciprocal")


def test_the_last_layers_are_those_of_the_model(tmp_path, monkeypatch):
    """The first of two shards holds the first layer, which is not the last one."""
    source = open_source(make_folder(tmp_path / "plain"))
    source = with_quantizer(source, full_precision_last_layers=1)
    write_folder(source, tmp_path / "latent", "latent")
    state = {name: t for name, t in make_state().items() if "layers.1." not in name}
    path = save(tmp_path / "latent" / "model-00001-of-00002.safetensors", state)
    report = convert(path, tmp_path / "out.bin", force=False)
    assert report["projections"] == 7
    for name, tensor in load(tmp_path / "out.bin").items():
        assert same_bits(tensor, fake_quantize(state[name]) if "_proj" in name else state[name])
    whole = convert(tmp_path / "latent" / "model.safetensors", tmp_path / "whole.bin", force=False)
    assert whole["projections"] == 7

    config = json.loads((tmp_path / "latent" / "config.json").read_text())
    for wrong in (None, 0, "2", True):
        changed = json.dumps(config | {"num_hidden_layers": wrong})
        (tmp_path / "latent" / "config.json").write_text(changed)
        with pytest.raises(CheckpointError, match=r"holds 1 layers.*says num_hid") as e:
            convert(path, tmp_path / "other.bin", force=False)
        assert "\n" not in str(e.value)
    (tmp_path / "latent" / "config.json").unlink()
    monkeypatch.setattr(qat_module, "_find_quantizer", lambda path: source.quantizer)
    with pytest.raises(CheckpointError, match=r"config\.json is missing\. Put the model's"):
        convert(path, tmp_path / "other.bin", force=False)


def test_a_folder_is_converted_as_a_whole(latent, tmp_path):
    convert(latent, tmp_path / "out", "ternary", 16, force=False)
    assert (tmp_path / "out" / "bitcpm_quantizer.json").is_file()
    # Of weights with a stamp nothing has to be forced, in a folder as in a file.
    convert(latent, tmp_path / "forced", "ternary", 16, force=True)
    plain = make_folder(tmp_path / "other")
    report = convert(plain, tmp_path / "out2", "ternary", -1)
    in_file = convert(plain / "model.safetensors", tmp_path / "out2.bin", "ternary", -1)
    keys = ("other_numerics", "changed_codes", "changed_fraction", "weights")
    assert {key: report[key] for key in keys} == {key: in_file[key] for key in keys}
    name = "model.layers.0.mlp.up_proj.weight"
    assert same_bits(load_all(tmp_path / "out2")[name], fake_quantize(make_state()[name]))
    with pytest.raises(CheckpointError, match="show no training"):
        convert(plain, tmp_path / "out3", "ternary", -1, force=False)


def test_weights_that_were_quantised_already(latent, tmp_path):
    write_folder(open_source(latent), tmp_path / "pseudo", "pseudo")
    weights = tmp_path / "pseudo" / "model.safetensors"
    for path in (tmp_path / "pseudo", weights):
        with pytest.raises(CheckpointError, match="was quantised before, says"):
            convert(path, tmp_path / "out.bin", "ternary", 16)
    # Without a stamp, or beside the stamp of other weights, their values tell.
    state = {
        name: t if "_proj" not in name else fake_quantize(t) for name, t in make_state().items()
    }
    unstamped = make_folder(tmp_path / "unstamped", state)
    rule = r"layers\.[01]\.self_attn\.q_proj\.weight lies on a grid already"
    for form in ("pseudo", "latent"):
        with pytest.raises(CheckpointError, match=rule):
            convert_folder(
                unstamped,
                tmp_path / "out",
                form=form,
                quant_type="ternary",
                group_size=-1,
                force=True,
            )
    save_file(state, latent / "model.safetensors")
    with pytest.raises(CheckpointError, match=rule):
        convert_folder(latent, tmp_path / "out", form="pseudo")
    with pytest.raises(CheckpointError, match="lies on a grid already"):
        convert(latent / "model.safetensors", tmp_path / "out.bin", "ternary", 16)
    assert not (tmp_path / "out").exists()


def test_an_output_beside_a_latent_config(latent, tmp_path):
    report = convert(latent / "model.safetensors", latent / "pytorch_model.bin", "ternary", 16)
    assert "would quantise pytorch_model.bin again" in report["warnings"][0]
    assert not convert(latent / "model.safetensors", tmp_path / "a.bin", "ternary", 16)["warnings"]


@pytest.mark.parametrize("block", ["x", [1], {}, {"quantizer": 3}])
def test_a_damaged_stamp_beside_the_file(block, latent, tmp_path):
    config = json.loads((latent / "config.json").read_text())
    (latent / "config.json").write_text(json.dumps(config | {"bitcpm_quantizer": block}))
    with pytest.raises(CheckpointError, match="is not that of a latent folder"):
        convert(latent / "model.safetensors", tmp_path / "out.bin", "ternary", 16)


# -- refused ---------------------------------------------------------------------------------------


def test_bad_inputs(tmp_path):
    output = tmp_path / "out.bin"

    def refused(state, message, *settings, **named):
        path = save(tmp_path / "in.bin", state)
        with pytest.raises(CheckpointError, match=message) as caught:
            convert(path, output, *settings, **named)
        assert "\n" not in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.bin"]

    state = make_state()
    refused(state, "shows? no training on the ternary grid.*--force", force=False)
    refused(state, r"q_proj.*group_size=48: in_features 64 is not a multiple", "ternary", 48)
    refused({**state, UP: state[UP].long()}, rf"{UP} is torch\.int64 .*not a matrix of float32")
    odd = torch.zeros(8).to(torch.float8_e4m3fn)
    refused({**state, "odd": odd}, r"odd is torch\.float8_e4m3fn, which is not written here")
    refused({**state, UP: state[UP][:0]}, rf"{UP} is torch\.bfloat16 \[0, 64\], not a matrix")
    far = {"model.layers.987654321.mlp.up_proj.weight": state[UP].clone()}
    refused({**state, **far}, "holds layer 987654321, but nothing of layer 2")
    without = {name: tensor for name, tensor in state.items() if name != UP}
    refused(without, f"lacks 1 projections: {UP}")
    refused({"a": torch.ones(2)}, "holds no projection")
    state[UP][7, 3] = float("nan")
    refused(state, f"{UP} holds a NaN or an infinity, first in row 7")
    state = make_state()
    state["model.norm.weight"][7] = float("inf")
    refused(state, "model.norm.weight holds a NaN or an infinity")
    state = make_state()
    state[UP] = fake_quantize(state[UP], 16, 1e-5, "five")
    refused(state, f"{UP} lies on a grid already")


def test_bad_settings(tmp_path):
    path = save(tmp_path / "in.bin", make_state())
    for settings, named, message in (
        (("q4", -1), {}, "quant_type='q4': must be 'ternary', 'asym4', 'half_sym4'"),
        (("ternary", "row"), {}, "group_size='row': must be a whole number of at least 1"),
        (("ternary", 0), {}, "group_size=0: must be a whole number of at least 1"),
        (("ternary", -1), {"numerics": "fp8"}, "numerics='fp8': must be 'fp32' or 'bf16_rec"),
        (
            ("five", -1),
            {"numerics": "bf16_reciprocal"},
            "exists for the ternary grid, not for five",
        ),
        (("ternary", -1), {"eps": 0.0}, "eps=0.0: the smallest scale"),
    ):
        with pytest.raises(BitcpmError, match=message):
            convert(path, tmp_path / "out.bin", *settings, **named)
    for output, message in (
        (tmp_path / "out.gguf", "is not a weight file by its name"),
        (path, "is the input"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(path, output)
    convert(path, tmp_path / "out.bin")
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(CheckpointError, match=r"out\.bin: exists"):
        convert(path, tmp_path / "out.bin")
    convert(path, tmp_path / "out.bin", overwrite=True)
    assert (tmp_path / "out.bin").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.bin", "out.bin"]


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_full_disk_leaves_the_old_output(suffix, tmp_path, monkeypatch):
    path, output = save(tmp_path / "in.bin", make_state()), tmp_path / f"out.{suffix}"
    convert(path, output)
    old = output.read_bytes()

    def full(*unused):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        convert(path, output, overwrite=True)
    monkeypatch.undo()
    assert output.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.bin", output.name])


@pytest.mark.parametrize("grid", ["ternary", "asym4", "half_sym4", "int_sym4", "five"])
@pytest.mark.parametrize("group_size", [8, 16, -1])
def test_what_lies_on_a_grid(grid, group_size):
    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert not lies_on_grid(w, 1e-5)
    assert lies_on_grid(fake_quantize(w, group_size, 1e-5, grid), 1e-5)
    assert not lies_on_grid(torch.zeros(4, 64), 1e-5)
    assert not lies_on_grid(torch.full((4, 64), float("nan")), 1e-5)
    # Two values other than 0 in each four are no grid.
    w[:, 0::4] = w[:, 2::4] = 0
    assert not lies_on_grid(w, 1e-5)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_line_of_the_cards(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "pytorch_model.bin", make_state())
    arguments = [
        "--input_bin",
        str(path),
        "--output",
        str(tmp_path / "out.bin"),
        "--quant_type",
        "ternary",
        "--group_size",
        "-1",
    ]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["qat-convert.py", *arguments, *more])
        runpy.run_path(str(TOOL), run_name="__main__")

    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("qat-convert: input_bin=")
    assert error.count("\n") == 1
    assert "quantisation error 0.2" in error
    assert "Add --force if a quantiser did train them" in error
    run("--force")
    printed = capsys.readouterr().out
    assert f"{7 * LAYERS} projections, ternary, group size -1, numerics fp32" in printed
    assert "no stamp: numerics bf16_reciprocal would change" in printed
    weights = LAYERS * sum(rows * columns for rows, columns in PROJECTIONS.values())
    assert f"of {weights} codes" in printed
    shutil.rmtree(tmp_path)
