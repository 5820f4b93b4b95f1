"""Unsound inputs of conversions: the message names the input, not the copy that was being made."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import pytest
import torch
from helpers.released_models import TINY, make_tensors, write_hf_folder
from safetensors.torch import load_file, save_file

from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.verify import verify
from megatron_bitcpm.errors import CheckpointError

QUANTIZER = {"quant_type": "ternary", "group_size": 32, "force": True}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blame") / "plain"
    return write_hf_folder(folder, TINY["1B"], make_tensors(TINY["1B"], seed=3))


@pytest.fixture(scope="module")
def latent(plain):
    convert(plain, plain.parent / "latent", form="latent", **QUANTIZER)
    return plain.parent / "latent"


@pytest.fixture(scope="module")
def pseudo(latent):
    convert(latent, latent.parent / "pseudo", form="pseudo")
    return latent.parent / "pseudo"


@pytest.fixture(scope="module")
def megatron(latent):
    convert(latent, latent.parent / "megatron", format="torch_dist")
    return latent.parent / "megatron"


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("format", ["torch_dist", "legacy", "hf"])
def test_nan_in_the_input_names_the_input(plain, tmp_path, format):
    folder = copy_of(plain, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(str(folder))) as caught:
        convert(folder, tmp_path / "out", format=format)
    assert "model.norm.weight" in str(caught.value)
    assert ".tmp-" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_stamp_of_other_groups_is_not_carried_over(pseudo, tmp_path):
    folder = copy_of(pseudo, tmp_path)
    path = folder / "bitcpm_quantizer.json"
    content = json.loads(path.read_text())
    content["quantizer"]["group_size"] = 16
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lists other tensors or groups"):
        convert(folder, tmp_path / "out", format="torch_dist")


@pytest.mark.parametrize("to", [{"form": "latent"}, {"format": "torch_dist"}])
def test_any_converted_model_is_replaced_and_a_run_never(latent, pseudo, megatron, tmp_path, to):
    for name, old in (("a", pseudo), ("b", megatron)):
        shutil.copytree(old, tmp_path / name)
        convert(latent, tmp_path / name, **to, overwrite=True)
        assert open_source(tmp_path / name).form == "latent"
    run = tmp_path / "run"
    (run / "iter_0000010").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(CheckpointError, match="is not a converted model, so it is not replaced"):
        convert(latent, run, **to, overwrite=True)


def test_companions_and_facts_come_back(latent, megatron, tmp_path):
    folder = copy_of(latent, tmp_path)
    (folder / "bitcpm_tokenizer.json").write_text('{"a": 1}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    config = json.loads((folder / "config.json").read_text())
    config["bitcpm_quantizer"]["source"] = {"iteration": 70, "tokens": 8, "valid_loss": 2.5}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "megatron", format="legacy")
    convert(tmp_path / "megatron", tmp_path / "back", form="latent")
    for name in ("bitcpm_tokenizer.json", "additional_chat_templates/tool.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    facts = open_source(tmp_path / "back").facts
    assert (facts["iteration"], facts["tokens"], facts["valid_loss"]) == (70, 8, 2.5)


@pytest.mark.parametrize("damage", ["malicious", "truncated", "flipped", "absent"])
def test_common_pt_of_a_converted_checkpoint(megatron, tmp_path, damage):
    run = copy_of(megatron, tmp_path)
    path, marker = run / "release" / "common.pt", tmp_path / "ran"
    content = bytearray(path.read_bytes())

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    if damage == "malicious":
        path.write_bytes(pickle.dumps({"args": Attack()}))
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "absent":
        path.unlink()
    else:
        content[content.index(b"data.pkl") + 80] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        open_source(run)
    assert not marker.exists()


def test_a_changed_modelling_file_is_noticed(latent, tmp_path):
    folder = copy_of(latent, tmp_path)
    verify(folder)
    with (folder / "modeling_bitcpm.py").open("a") as file:
        file.write("# more\n")
    with pytest.raises(CheckpointError, match=r"modeling_bitcpm\.py, which computes the forward"):
        verify(folder)
