"""What the first version wrote loads, verifies, converts to the same bits, and resumes."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from helpers.runs import numbers, train_well
from safetensors.torch import load_file

from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.inspect import inspect
from megatron_bitcpm.conversion.verify import verify

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0"
pytestmark = pytest.mark.both_versions


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The old models, in the working folder: their run names its data from there."""
    with tarfile.open(FIXTURES / "models.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", ["run", "latent", "legacy", "pseudo"])
def test_each_verifies_against_the_run(models, model):
    report = verify(model, "run")
    assert report["compared_tensors"] == 21 and report["differing_codes"] == 0
    assert report["ternary_tensors"] == 14


@pytest.mark.parametrize("model", ["run", "latent", "legacy"])
@pytest.mark.parametrize("form", ["latent", "pseudo"])
def test_converting_gives_the_old_bits(models, model, form):
    convert(model, "again", form=form)
    old, new = load_file(f"{form}/model.safetensors"), load_file("again/model.safetensors")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.equal(new[name]), name
    stamps = [_stamp(Path(folder), form) for folder in (form, "again")]
    assert stamps[0] == stamps[1]


def _stamp(folder, form):
    if form == "pseudo":
        return json.loads((folder / "bitcpm_quantizer.json").read_text())["quantizer"]
    block = json.loads((folder / "config.json").read_text())["bitcpm_quantizer"]
    return {key: value for key, value in block.items() if key != "source"}


@pytest.mark.parametrize("model", ["run", "latent", "legacy", "pseudo"])
def test_inspecting_finds_no_problem(models, model):
    report = inspect(model)
    assert report["problems"] == [] and report["contradictions"] == []
    assert report["stamp"]["tensor_model_parallel_size"] == 2


def test_the_run_continues(models):
    train_well(2, models / "run.yaml", "--resume", "--set", "training.train_iters=8")
    expected = json.loads((FIXTURES / "continued.json").read_text())
    losses = numbers(models / "run", "loss")
    # Other processors multiply matrices in another order.
    for step, loss in expected["loss"].items():
        assert losses[int(step)] == pytest.approx(loss, rel=1e-4)
    assert numbers(models / "run", "valid_loss")[8] == pytest.approx(
        expected["valid_loss"], rel=1e-4
    )
