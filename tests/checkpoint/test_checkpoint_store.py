"""Checkpoint folders: found, read, and refused in one line when damaged."""

from __future__ import annotations

import json
import os

import pytest
import torch
import yaml
from helpers.model_factory import tiny_fields
from torch.distributed.checkpoint import save

from megatron_bitcpm.checkpoint import store
from megatron_bitcpm.config import parse_config
from megatron_bitcpm.errors import CheckpointError

CONFIG = {
    "model": tiny_fields("store"),
    "parallel": {"tensor_model_parallel_size": 1},
    "data": {"prefix": "d", "tokenizer": "t", "seq_length": 8},
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 10, "micro_batch_size": 1, "global_batch_size": 2},
    "checkpoint": {"directory": "run"},
}


def publish(run_dir, iteration):
    """Publish a checkpoint of two ranks with a tensor in it."""
    config = parse_config(yaml.safe_dump(CONFIG), world_size=2)
    scratch = store.begin_checkpoint(run_dir, iteration)
    save({"w": torch.arange(6.0)}, checkpoint_id=str(scratch), no_dist=True)
    torch.save({}, scratch / "common.pt")
    (scratch / "metadata.json").write_text("{}")
    facts = {"iteration": iteration, "world_size": 2}
    return store.publish_checkpoint(scratch, run_dir, iteration, config, facts)


@pytest.fixture
def run(tmp_path):
    """A run's folder with one checkpoint, of step 7."""
    publish(tmp_path, 7)
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
    refuse(lambda: store.find_checkpoint(run), f"{store.TRACKER}: does not name a checkpoint")


def test_a_tracker_of_an_absent_checkpoint(run):
    (run / store.TRACKER).write_text("8\n")
    refuse(
        lambda: store.find_checkpoint(run),
        "iter_0000008: is named by .* but incomplete or absent: no such folder",
    )
    (run / store.TRACKER).write_text("iter_0000007")
    assert store.find_checkpoint(run).name == "iter_0000007"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (".metadata", "no .metadata"),
        ("common.pt", "no common.pt"),
        ("__0_0.distcp", "no __0_0.distcp"),
        (store.STATE_FILE, f"no {store.STATE_FILE}"),
        (store.CONFIG_FILE, f"no {store.CONFIG_FILE}"),
    ],
)
def test_an_incomplete_newest_checkpoint_names_the_newest_complete_one(name, damage, run):
    for iteration in (8, 9, 10):
        publish(run, iteration)
    (run / "iter_0000009" / "common.pt").unlink()
    (run / "iter_0000010" / name).unlink()
    message = (
        f"iter_0000010: is named by {store.TRACKER} but incomplete or absent: {damage}. "
        f"Write 8 into {store.TRACKER} to use iter_0000008, the newest complete one."
    )
    with pytest.raises(CheckpointError) as caught:
        store.find_checkpoint(run)
    assert str(caught.value).endswith(message)


def test_a_newest_checkpoint_with_a_damaged_index(run):
    publish(run, 8)
    path = run / "iter_0000008" / ".metadata"
    path.write_bytes(path.read_bytes()[:50])
    refuse(lambda: store.find_checkpoint(run), r"\.metadata: cannot be loaded: .* Write 7 into")


def test_without_a_tracker_the_newest_complete_one_is_named(run):
    (run / store.TRACKER).unlink()
    refuse(lambda: store.find_checkpoint(run), "neither a checkpoint nor a run .* Write 7 into")
    assert store.has_checkpoints(run)


def test_a_folder_without_checkpoints(tmp_path):
    assert not store.has_checkpoints(tmp_path / "absent")
    (tmp_path / "iter_0000001").mkdir()
    assert not store.has_checkpoints(tmp_path)
    refuse(lambda: store.find_checkpoint(tmp_path), "Name the folder that holds")


def test_an_older_checkpoint_that_the_user_names_is_respected(run):
    publish(run, 8)
    (run / store.TRACKER).write_text("7")
    assert store.find_checkpoint(run).name == "iter_0000007"
    # Also where a crash left a note about what was to follow another one.
    (run / store.NEXT_FILE).write_text("8 after 6\n")
    assert store.find_checkpoint(run).name == "iter_0000007"


def test_a_checkpoint_that_a_crash_kept_from_the_tracker(run):
    publish(run, 8)
    (run / store.TRACKER).write_text("7")
    for note, name in (("8 after 7\n", "iter_0000008"), ("8 after 7", "iter_0000007")):
        (run / store.NEXT_FILE).write_text(note)
        assert store.find_checkpoint(run).name == name


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
        ({"format_version": 1}, "format_version=1: this package reads 2"),
        ({"iteration": None}, "iteration=None: must be a valid integer"),
        ({"iteration": "7"}, "iteration='7': must be a valid integer"),
        ({"world_size": None}, "world_size=None: must be a valid integer"),
        ({"world_size": 0}, "world_size=0: must be greater than or equal to 1"),
        ({"world_size": True}, "world_size=True: must be a valid integer"),
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
    refuse(lambda: store.read_config(path.parent), f"{key} is missing")


def test_a_damaged_configuration(run):
    folder = run / "iter_0000007"
    (folder / store.CONFIG_FILE).write_bytes(b"\xff\xfe")
    refuse(lambda: store.read_config(folder), f"{store.CONFIG_FILE}: .*The checkpoint is damaged")
    (folder / store.CONFIG_FILE).write_text("model: {}")
    refuse(lambda: store.read_config(folder), r"model\.num_layers=\(absent\): is required")
