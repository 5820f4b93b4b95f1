"""Checkpoint folders: found, read, and refused in one line when damaged."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from megatron_bitcpm.checkpoint import store
from megatron_bitcpm.config import parse_config
from megatron_bitcpm.errors import CheckpointError

CONFIG = {
    "model": {
        "num_layers": 1,
        "hidden_size": 64,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "max_position_embeddings": 8,
    },
    "parallel": {"tensor_model_parallel_size": 1},
    "data": {"prefix": "d", "tokenizer": "t", "seq_length": 8},
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 10, "micro_batch_size": 1, "global_batch_size": 2},
    "checkpoint": {"directory": "run"},
}


@pytest.fixture
def run(tmp_path):
    """A run's folder with one checkpoint, of step 7 and two ranks."""
    config = parse_config(yaml.safe_dump(CONFIG), world_size=2)
    scratch = store.begin_checkpoint(tmp_path, 7)
    store.publish_checkpoint(scratch, tmp_path, 7, config, {"iteration": 7, "world_size": 2})
    return tmp_path


def refuse(call, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_published_checkpoint_is_found_and_read(run):
    folder = store.find_checkpoint(run)
    assert folder == run / "iter_0000007" == store.find_checkpoint(folder)
    assert store.read_state(folder)["iteration"] == 7
    assert store.read_config(folder).training.train_iters == 10
    assert sorted(path.name for path in run.iterdir()) == ["iter_0000007", store.TRACKER]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe7\x00",
        b"",
        b"seven",
        b"7\n8",
        b"../other",
        b"9" * 5000,
        b"\x007",
        "\u0667".encode(),
    ],
)
def test_a_damaged_tracker(content, run):
    (run / store.TRACKER).write_bytes(content)
    refuse(lambda: store.find_checkpoint(run), f"{store.TRACKER}: names no checkpoint")


def test_a_tracker_of_an_absent_checkpoint(run):
    (run / store.TRACKER).write_text("8\n")
    refuse(lambda: store.find_checkpoint(run), "iter_0000008: named by .* but incomplete or absent")
    (run / store.TRACKER).write_text("iter_0000007")
    assert store.find_checkpoint(run).name == "iter_0000007"


def test_a_folder_that_cannot_be_read(run, monkeypatch):
    def fail(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", fail)
    refuse(lambda: store.find_checkpoint(run), "cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ({"format_version": 2}, "format_version=2: this package reads 1"),
        ({"iteration": None}, "iteration is None, not a number from 0"),
        ({"iteration": "7"}, "iteration is '7', not a number from 0"),
        ({"world_size": None}, "world_size is None, not a number from 1"),
        ({"world_size": 0}, "world_size is 0, not a number from 1"),
        ({"world_size": True}, "world_size is True, not a number from 1"),
    ],
)
def test_a_damaged_state(content, message, run):
    folder = run / "iter_0000007"
    path = folder / store.STATE_FILE
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    refuse(lambda: store.read_state(folder), message)
    refuse(lambda: store.read_config(folder), message)


@pytest.mark.parametrize("key", ["iteration", "world_size"])
def test_a_state_without_a_key(key, run):
    path = run / "iter_0000007" / store.STATE_FILE
    state = json.loads(path.read_text())
    del state[key]
    path.write_text(json.dumps(state))
    refuse(lambda: store.read_config(path.parent), f"{key} is None, not a number")


def test_a_damaged_configuration(run):
    folder = run / "iter_0000007"
    (folder / store.CONFIG_FILE).write_bytes(b"\xff\xfe")
    refuse(lambda: store.read_config(folder), f"{store.CONFIG_FILE}: .*The checkpoint is damaged")
    (folder / store.CONFIG_FILE).write_text("model: {}")
    refuse(lambda: store.read_config(folder), r"model\.num_layers=\(absent\): is required")
