"""Saving at once and in the background: what is written, when it counts, and how it fails."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from helpers.checkpoint_cases import Schedule, build, load_and_train, run_config
from helpers.ranks import run_ranks

from megatron_bitcpm.checkpoint.safe_load import find_damage
from megatron_bitcpm.checkpoint.store import find_checkpoint

pytestmark = pytest.mark.both_versions

TP2 = {"tp": 2}
SHARDED = {"distributed_optimizer": True}
CPU = torch.device("cpu")


def hold_writing(monkeypatch_target, gate):
    """Let the writer thread wait for `gate` before it writes."""
    original = monkeypatch_target.write

    def write(self):
        gate.wait()
        original(self)

    monkeypatch_target.write = write
    return original


def train_while_saving(rank, directory, layout):
    """Save after two steps in the background and go on; return the steps after the save."""
    import threading

    from megatron_bitcpm.checkpoint.saver import CheckpointSaver
    from megatron_bitcpm.checkpoint.writer import PlannedSave

    gate = threading.Event()
    original = hold_writing(PlannedSave, gate)
    try:
        with build(layout) as run:
            saver = CheckpointSaver(run_config(Path(directory), async_save=True), CPU)
            for step in (0, 1):
                run.train_step(step)
            facts = {"iteration": 2, "world_size": 2}
            reports = saver.save(run.chunks, run.optimizer, Schedule(2), {"iteration": 2}, facts)
            assert reports == []
            assert saver.poll() is None
            # These steps change parameters and moments in place before anything is written.
            steps = [run.train_step(step) for step in (2, 3)]
            if rank == 1:
                gate.set()
            torch.distributed.barrier()
            # Rank 1 may be done; the checkpoint is not there before rank 0 is.
            assert saver.poll() is None
            assert not (Path(directory) / "iter_0000002").exists()
            gate.set()
            report = saver.finish()
            assert saver.poll() is None
            assert (report.iteration, report.folder.name) == (2, "iter_0000002")
            assert report.stall_s > 0
            assert report.write_s > 0
            return steps
    finally:
        PlannedSave.write = original


@pytest.mark.parametrize(
    "layout",
    [TP2, SHARDED],
    ids=["tp2", "dp2_sharded"],
)
@pytest.mark.slow
def test_training_goes_on_during_a_save(layout, tmp_path):
    wanted = run_ranks(2, train_while_saving, str(tmp_path), layout)
    folder = find_checkpoint(tmp_path)
    assert find_damage(folder) is None
    assert run_ranks(2, load_and_train, str(folder), layout) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]


def save_many(rank, directory, settings):
    from megatron_bitcpm.checkpoint.saver import CheckpointSaver

    with build(TP2) as run:
        saver = CheckpointSaver(run_config(Path(directory), **settings), CPU)
        published = []
        for iteration in range(1, 7):
            facts = {"iteration": iteration, "world_size": 2}
            progress = {"iteration": iteration}
            reports = saver.save(run.chunks, run.optimizer, Schedule(), progress, facts)
            published.append([report.iteration for report in reports])
        last = saver.finish()
        return published, last and last.iteration


def test_one_save_is_in_flight_and_surplus_goes(tmp_path):
    settings = {"async_save": True, "keep_last_n": 2, "keep_every_n": 2}
    published, last = run_ranks(2, save_many, str(tmp_path), settings)[0]
    # The second waits for the first, and so on; the end waits for the last.
    assert published == [[], [1], [2], [3], [4], [5]]
    assert last == 6
    names = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert names == [f"iter_000000{n}" for n in (2, 4, 5, 6)]


def test_at_once(tmp_path):
    published, last = run_ranks(2, save_many, str(tmp_path), {"keep_last_n": 1})[0]
    assert published == [[1], [2], [3], [4], [5], [6]]
    assert last is None
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000006"]


def fail_to_save(rank, directory, async_save, failing_rank, limit):
    """A good save, then one under a limit of file sizes, then a good one again."""
    from megatron_bitcpm.checkpoint.saver import CheckpointSaver
    from megatron_bitcpm.errors import BitcpmError

    with build(TP2) as run:
        saver = CheckpointSaver(run_config(Path(directory), async_save=async_save), CPU)

        def save(iteration):
            facts = {"iteration": iteration, "world_size": 2}
            run.train_step(iteration)
            saver.save(run.chunks, run.optimizer, Schedule(), {"iteration": iteration}, facts)
            saver.finish()

        save(1)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == failing_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            save(2)
            message = "saved"
        except BitcpmError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        torch.distributed.barrier()
        left = sorted(path.name for path in Path(directory).iterdir())
        torch.distributed.barrier()
        save(3)
        return message, left


# The limits stop the first file, the tensors, and nothing but the index.
@pytest.mark.parametrize(
    ("rank", "limit", "async_save"),
    [
        (0, 100, False),
        pytest.param(1, 50_000, True, marks=pytest.mark.slow),
        pytest.param(0, 100, True, marks=pytest.mark.slow),
        pytest.param(1, 50_000, False, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_stops_in_one_line_and_leaves_the_last_good_one(
    rank, limit, async_save, tmp_path
):
    results = run_ranks(2, fail_to_save, str(tmp_path), async_save, rank, limit)
    assert results[0] == results[1]
    message, left = results[0]
    assert message.startswith(f"checkpoint.directory={tmp_path}: cannot be written: File too large")
    assert "\n" not in message
    assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    # It was the disk, not the saver: room comes, and the next save is good.
    assert find_checkpoint(tmp_path).name == "iter_0000003"


def fail_in_the_index(rank, directory):
    """Rank 0 alone writes the index; the disk is full just then."""
    from megatron_bitcpm.checkpoint.saver import CheckpointSaver
    from megatron_bitcpm.checkpoint.writer import FileSystemWriterAsync
    from megatron_bitcpm.errors import BitcpmError

    def finish(self, *args):
        raise OSError(errno.ENOSPC, "x")

    original = FileSystemWriterAsync.finish
    FileSystemWriterAsync.finish = finish
    try:
        with build(TP2) as run:
            saver = CheckpointSaver(run_config(Path(directory)), CPU)
            facts = {"iteration": 1, "world_size": 2}
            saver.save(run.chunks, run.optimizer, Schedule(), {"iteration": 1}, facts)
    except BitcpmError as error:
        return str(error)
    finally:
        FileSystemWriterAsync.finish = original
    return "saved"


def test_a_disk_that_fills_up_at_the_index(tmp_path):
    messages = run_ranks(2, fail_in_the_index, str(tmp_path))
    assert messages[0] == messages[1]
    assert "No space left on device" in messages[0]
    assert list(tmp_path.iterdir()) == []


def save_beside_a_file(rank, directory):
    from megatron_bitcpm.checkpoint.saver import CheckpointSaver
    from megatron_bitcpm.errors import BitcpmError

    with build(TP2) as run:
        saver = CheckpointSaver(run_config(Path(directory)), CPU)
        try:
            facts = {"iteration": 1, "world_size": 2}
            saver.save(run.chunks, run.optimizer, Schedule(), {"iteration": 1}, facts)
        except BitcpmError as error:
            return str(error)
    return "saved"


def test_a_folder_that_cannot_be_made(tmp_path):
    # Root may write anywhere; a file in the place of a folder stops everybody.
    (tmp_path / "run").write_text("")
    messages = run_ranks(2, save_beside_a_file, str(tmp_path / "run"))
    assert messages[0] == messages[1]
    assert "cannot be written: Not a directory" in messages[0]
