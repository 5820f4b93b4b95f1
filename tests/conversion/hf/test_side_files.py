"""What goes with the weights is that of the model: tokenizer, config.json, generation settings."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.megatron_models import make_source
from helpers.released_models import write_tokenizer
from helpers.stock_checkpoints import write_stock
from helpers.tiny_folders import make_folder, make_state

from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.megatron.open import open_megatron
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import tokenizer_sha256

CASE = "tp1_untied"
OUTPUTS = {
    "torch_dist": {"format": "torch_dist"},
    "legacy": {"format": "legacy"},
    "plain": {"form": "plain"},
    "latent": {"form": "latent"},
    "pseudo": {"form": "pseudo"},
}
QUANTIZER = {"quant_type": "ternary", "group_size": -1, "force": True}


def make_tokenizer(folder, size):
    folder.mkdir()
    write_tokenizer(folder, size)
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("size", [50, 62])
def test_a_tokenizer_has_as_many_ids_as_the_arguments_say(size, tmp_path):
    folder = write_stock(make_source(tmp_path), tmp_path / "run")
    fitting = make_tokenizer(tmp_path / "fitting", 61)
    assert open_megatron(folder, fitting).vocab_size == 61
    other = make_tokenizer(tmp_path / "other", size)
    with pytest.raises(CheckpointError, match=f"files hold {size} ids, the model has 61"):
        open_megatron(folder, other)


def test_where_nothing_is_recorded_the_tokenizer_says_the_size(tmp_path):
    folder = write_stock(make_source(tmp_path), tmp_path / "run", vocab_size=None)
    assert open_megatron(folder, make_tokenizer(tmp_path / "tok", 50)).vocab_size == 50


@pytest.mark.parametrize("to", ["torch_dist", "legacy", "pseudo"])
def test_a_run_takes_no_other_tokenizer(to, trained, tmp_path):
    run, resaved = trained(CASE), tmp_path / "resaved"
    shutil.copytree(run.tokenizer, resaved)
    (resaved / "special_tokens_map.json").write_text("{}")
    for folder, message in (
        (tmp_path / "absent", "absent: no such folder"),
        (make_tokenizer(tmp_path / "small", 9), "small: its files hold 9 ids, the model has 300"),
        (resaved, "resaved: is not the one of the training"),
    ):
        with pytest.raises(CheckpointError, match=f"^tokenizer=.*{message}"):
            convert(run.directory, tmp_path / "out", **OUTPUTS[to], tokenizer=folder)
    assert not (tmp_path / "out").exists()
    convert(run.directory, tmp_path / "out", **OUTPUTS[to], tokenizer=run.tokenizer)


def test_a_tokenizer_saved_anew_goes_with_its_model(trained, tmp_path):
    """Fine-tuning saves the tokenizer again: other bytes, the same ids."""
    convert(trained(CASE).directory, tmp_path / "latent", form="latent")
    path = tmp_path / "latent" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    convert(tmp_path / "latent", tmp_path / "dist", format="torch_dist")
    convert(tmp_path / "dist", tmp_path / "pseudo", form="pseudo")
    assert (tmp_path / "pseudo" / "tokenizer.json").read_bytes() == path.read_bytes()
    convert(tmp_path / "dist", tmp_path / "named", form="pseudo", tokenizer=tmp_path / "latent")
    facts = open_source(tmp_path / "dist").facts
    assert facts["tokenizer_sha256"] == tokenizer_sha256(tmp_path / "latent")
    # Another one than that is refused as before, wherever it lies.
    with pytest.raises(CheckpointError, match="is not the one of the training"):
        convert(
            tmp_path / "dist", tmp_path / "no", form="pseudo", tokenizer=trained(CASE).tokenizer
        )
    beside = tmp_path / "dist" / "release" / "hf" / "special_tokens_map.json"
    beside.write_text("{}")
    with pytest.raises(CheckpointError, match="is not the one of the training"):
        convert(tmp_path / "dist", tmp_path / "no", form="pseudo")


def test_config_json_of_a_tokenizer_is_not_that_of_the_model(tmp_path):
    start = make_folder(tmp_path / "start")
    convert(start, tmp_path / "dist", format="torch_dist")
    foreign = shutil.copytree(start, tmp_path / "elsewhere" / "hf")
    edit_json(foreign / "config.json", eos_token_id=17, of_another_model=True)
    (foreign / "model.safetensors").unlink()
    convert(tmp_path / "dist", tmp_path / "out", form="plain", tokenizer=foreign)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == 2 and "of_another_model" not in config
    # Nor does it get into another checkpoint, where it would pass for the model's.
    convert(tmp_path / "dist", tmp_path / "legacy", format="legacy", tokenizer=foreign)
    assert not (tmp_path / "legacy" / "release" / "hf" / "config.json").exists()
    # However the checkpoint's own folder is spelled.
    own = tmp_path / "dist" / "release" / ".." / "release" / "hf"
    convert(tmp_path / "dist", tmp_path / "own", form="plain", tokenizer=own)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["eos_token_id"] == [2, 39]


@pytest.mark.parametrize("to", ["latent", "pseudo"])
def test_the_type_is_that_of_the_projections(to, tmp_path):
    state = make_state()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name].float()
    start = make_folder(tmp_path / "start", state)
    convert(start, tmp_path / "out", **OUTPUTS[to], **QUANTIZER)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert open_source(tmp_path / "out").dtype("lm_head.weight") == torch.float32


@pytest.mark.parametrize("to", ["plain", "torch_dist", "legacy"])
@pytest.mark.parametrize("text", ["[", "[]"])
def test_generation_settings_that_cannot_be_loaded(text, to, tmp_path):
    start = make_folder(tmp_path / "start")
    (start / "generation_config.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"^file=\S+/start/generation_config\.json: "
    ) as caught:
        convert(start, tmp_path / "out", **OUTPUTS[to])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


@pytest.mark.parametrize(("to", "inside"), [("plain", ""), ("legacy", "release/hf")])
def test_the_report_names_the_tokenizer_where_it_will_be(to, inside, tmp_path):
    report = convert(make_folder(tmp_path / "start"), tmp_path / "out", **OUTPUTS[to])
    checked = report["verify"]["checked_tokenizer"]
    assert checked == str(tmp_path / "out" / inside)
    assert (tmp_path / "out" / inside / "tokenizer.json").is_file()
