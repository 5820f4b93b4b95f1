"""A process that dies at any point of publishing and deleting leaves a run that goes on."""

from __future__ import annotations

import os
import shutil

import pytest
from helpers.checkpoint_cases import run_config, write_files
from helpers.death import die_at

from megatron_bitcpm.checkpoint.retention import clean_leftovers, delete_surplus
from megatron_bitcpm.checkpoint.safe_load import find_damage
from megatron_bitcpm.checkpoint.store import (
    STATE_FILE,
    begin_checkpoint,
    find_checkpoint,
    iteration_name,
    publish_checkpoint,
)


def publish(run_dir, iteration, keep_last_n=None):
    scratch = begin_checkpoint(run_dir, iteration)
    write_files(scratch)
    finish(run_dir, iteration, keep_last_n)


def finish(run_dir, iteration, keep_last_n=None):
    scratch = run_dir / f".tmp-{iteration_name(iteration)}"
    facts = {"iteration": iteration, "world_size": 1}
    publish_checkpoint(scratch, run_dir, iteration, run_config(run_dir), facts)
    delete_surplus(run_dir, iteration, keep_last_n, None)


@pytest.fixture
def template(tmp_path):
    """A run with checkpoints 1 and 2, and a scratch folder of 3."""
    run = tmp_path / "template"
    for iteration in (1, 2):
        publish(run, iteration)
    write_files(begin_checkpoint(run, 3))
    return run


def check_goes_on(run, least):
    """Resume as a run does: find, clean, find again, save; return what was found."""
    found = find_checkpoint(run)
    assert find_damage(found) is None
    clean_leftovers(run)
    assert find_checkpoint(run).name == found.name.removeprefix(".old-")
    hidden = [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert hidden == []
    for path in run.glob("iter_*"):
        assert find_damage(path) is None
    publish(run, 4, keep_last_n=1)
    assert [path.name for path in run.glob("iter_*")] == ["iter_0000004"]
    name = found.name.removeprefix(".old-")
    assert int(name.removeprefix("iter_")) >= least
    return name


@pytest.mark.slow
def test_death_at_every_change_of_publishing_and_deleting(template, tmp_path):
    found, event = [], 0
    while True:
        event += 1
        run = shutil.copytree(template, tmp_path / f"run{event}")
        died = die_at(event, lambda run=run: finish(run, 3, keep_last_n=1))
        found.append(check_goes_on(run, least=2))
        if not died:
            break
    # The change from 2 to 3 is one moment, and both sides of it were hit.
    assert found == sorted(found)
    assert {found[0], found[-1]} == {"iter_0000002", "iter_0000003"}
    assert event > 15


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["1", "2"])
def test_death_while_a_checkpoint_is_replaced(tracker, template, tmp_path):
    # Step 2 comes again, after the user went back to 1 or because it is saved twice.
    (template / "latest_checkpointed_iteration.txt").write_text(tracker)
    event, died = 0, True
    while died:
        event += 1
        run = shutil.copytree(template, tmp_path / f"run{event}")
        write_files(begin_checkpoint(run, 2))
        (run / ".tmp-iter_0000002" / "new").touch()
        died = die_at(event, lambda run=run: finish(run, 2))
        found = find_checkpoint(run)
        # The course that was left does not come back: 2 is the new one, or there is only 1.
        if tracker == "1":
            assert (found.name == "iter_0000002") == (found / "new").exists()
        check_goes_on(run, least=int(tracker))


def test_retention(tmp_path):
    for iteration in range(1, 10):
        publish(tmp_path, iteration)
    later = shutil.copytree(tmp_path / "iter_0000009", tmp_path / "iter_0000012")
    foreign = tmp_path / "iter_0000000"
    foreign.mkdir()
    link = tmp_path / "iter_0000010"
    link.symlink_to(tmp_path / "iter_0000002")
    deleted = delete_surplus(tmp_path, 9, keep_last_n=2, keep_every_n=4)
    assert deleted == [7, 6, 5, 3, 2, 1]
    left = sorted(int(path.name[5:]) for path in tmp_path.glob("iter_*") if not path.is_symlink())
    assert left == [0, 4, 8, 9, 12]
    assert later.is_dir()
    assert link.is_symlink()
    assert delete_surplus(tmp_path, 9, None, None) == []


def test_a_checkpoint_that_cannot_be_deleted_stays(tmp_path, monkeypatch, caplog):
    for iteration in (1, 2):
        publish(tmp_path, iteration)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    assert delete_surplus(tmp_path, 2, 1, None) == []
    assert "iter_0000001 cannot be deleted: Permission denied" in caplog.text
    assert (tmp_path / "iter_0000001" / STATE_FILE).is_file()


def test_cleaning_leaves_everything_else(tmp_path):
    publish(tmp_path, 1)
    for name in ("metrics.csv", ".tmp-mine", ".deleted-mine", ".tmp-iter_of_mine"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmp-iter_0000002").symlink_to(tmp_path / "iter_0000001")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    clean_leftovers(tmp_path)
    clean_leftovers(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
