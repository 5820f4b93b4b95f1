"""A run that begins with the weights of a converted checkpoint."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml
from helpers.model_factory import tiny_model
from helpers.ranks import run_ranks
from helpers.trained_checkpoints import BASE

from megatron_bitcpm.checkpoint.init_from import check_init_from, find_origin
from megatron_bitcpm.checkpoint.model_file import MODEL_FILE, ModelFile, read_model_file
from megatron_bitcpm.checkpoint.store import find_checkpoint
from megatron_bitcpm.config import parse_config
from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.both_versions


@pytest.fixture(scope="module")
def latent(trained, tmp_path_factory):
    """A latent Hugging Face folder."""
    folder = tmp_path_factory.mktemp("latent") / "hf"
    convert(trained("tp2_bf16").directory, folder, form="latent")
    return folder


@pytest.fixture(scope="module")
def converted(latent, tmp_path_factory):
    """The folder as a torch_dist checkpoint for two tensor-parallel ranks."""
    run = tmp_path_factory.mktemp("converted") / "run"
    convert(latent, run, format="torch_dist", tensor_parallel_size=2)
    return run


def run_config(data, tmp_path, converted, **model):
    tree = copy.deepcopy(BASE)
    # A Hugging Face folder does not say how the embedding had been padded.
    tree["model"] |= {"make_vocab_size_divisible_by": 128, **model}
    tree["data"] |= {"prefix": str(data / "d"), "tokenizer": str(data / "tok")}
    # One step that moves no weight: what is saved is what was loaded.
    tree["training"]["train_iters"] = 1
    tree["optimizer"] = {"lr": 1e-30, "weight_decay": 0.0}
    tree["parallel"]["tensor_model_parallel_size"] = 2
    tree["checkpoint"] |= {"directory": str(tmp_path / "run"), "init_from": str(converted)}
    return yaml.safe_dump(tree)


def train(rank, text):
    from megatron_bitcpm.training.trainer import train as run

    run(parse_config(text, world_size=2), resume=False)


@pytest.mark.slow
def test_the_run_begins_with_the_converted_weights(data, converted, latent, tmp_path):
    run_ranks(2, train, run_config(data, tmp_path, converted), timeout_s=200)
    began, wanted = open_source(tmp_path / "run"), open_source(latent)
    for name in wanted.shapes():
        assert torch.equal(began.tensor(name), wanted.tensor(name)), name


def test_another_architecture_is_refused(data, converted, tmp_path):
    config = parse_config(run_config(data, tmp_path, converted, num_layers=2), world_size=2)
    origin = find_origin(converted)
    with pytest.raises(ConfigError, match=r"model\.num_layers=2: checkpoint\.init_from .* has 3"):
        check_init_from(config, origin.model, origin.folder)


@pytest.mark.parametrize("part", [".", "release"])
def test_the_origin_is_found_by_run_and_by_folder(converted, latent, part):
    origin = find_origin(converted / part)
    assert origin.folder.resolve() == (converted / "release").resolve()
    assert origin.model == open_source(latent).model
    assert origin.tokenizer_sha256 is not None


def test_a_converted_checkpoint_cannot_be_resumed(converted):
    with pytest.raises(CheckpointError, match=r"holds weights alone\. .*checkpoint\.init_from\."):
        find_checkpoint(converted)


def test_legacy_shards_are_no_beginning(latent, tmp_path):
    convert(latent, tmp_path / "run", format="legacy")
    with pytest.raises(CheckpointError, match=r"not in the torch_dist format\. Convert it"):
        find_origin(tmp_path / "run")


def test_a_damaged_description_is_named(converted, tmp_path):
    (tmp_path / "bitcpm_model.json").write_text('{"format_version": 1, "form": "latent"}')
    with pytest.raises(
        CheckpointError, match=r"bitcpm_model\.json: cannot be read: model is missing"
    ):
        find_origin(tmp_path)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"form": "latent"}, "form latent needs a quantizer"),
        ({"facts": {"iteration": [1]}}, "facts.iteration must be a number"),
        ({"facts": {"valid_loss": True}}, "facts.valid_loss must be a number"),
    ],
)
def test_a_description_that_contradicts_itself(tmp_path, changes, rule):
    described = ModelFile(form="plain", model=tiny_model(), vocab_size=9, padded_vocab_size=9)
    (tmp_path / MODEL_FILE).write_text(json.dumps(json.loads(described.to_json()) | changes))
    with pytest.raises(CheckpointError, match=rule):
        read_model_file(tmp_path)
