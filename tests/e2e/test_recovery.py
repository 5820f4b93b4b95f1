"""Signals and crashes: what was promised is on disk, and the run goes on as if nothing happened."""

from __future__ import annotations

import random
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.runs import (
    call_cli,
    disturb,
    keep_only,
    metrics,
    numbers,
    tensors,
    tracked,
    train_well,
)

from megatron_bitcpm.checkpoint.safe_load import find_damage

pytestmark = pytest.mark.both_versions

KILLS = 20


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        # A scheduler may signal one process only; the ranks agree.
        pytest.param(signal.SIGTERM, [1], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, [0, 1], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [0, 1], marks=pytest.mark.slow),
    ],
    ids=["SIGTERM-rank1", "SIGTERM-all", "SIGINT-all"],
)
def test_a_signal_saves_and_exits_with_0(write_config, tmp_path, number, ranks):
    settings = {
        "parallel__tensor_model_parallel_size": 2,
        "training__train_iters": 400,
        "training__eval_interval": 400,
        "checkpoint__save_interval": 400,
    }
    config = write_config("run", **settings)
    log = tmp_path / "run" / "metrics.jsonl"

    def several_steps_done() -> bool:
        return log.is_file() and log.read_text().count("\n") > 5

    codes = disturb(2, ["train", "--config", str(config)], several_steps_done, number, ranks)
    assert codes == [0, 0]
    stopped = tracked(tmp_path / "run")
    assert 5 < stopped < 400
    assert max(numbers(tmp_path / "run", "loss")) == stopped
    train_well(2, config, "--resume", "--set", f"training.train_iters={stopped + 2}")
    assert sorted(numbers(tmp_path / "run", "loss")) == list(range(1, stopped + 3))


def test_exit_after_a_time(write_config, tmp_path):
    config = write_config(
        "run",
        training__train_iters=100000,
        training__exit_duration_in_mins=1e-4,
        training__eval_interval=100000,
    )
    messages = train_well(1, config)
    assert tracked(tmp_path / "run") >= 1
    assert "training.exit_duration_in_mins: saved; --resume continues" in messages[0]


def train_with_full_disk(rank: int, arguments: list[str]) -> tuple[int, str]:
    """Train; no file of rank 1 can have more than 50 kB."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        return call_cli(rank, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.slow
def test_a_failed_save_stops_all_ranks_and_the_run_goes_on(write_config, tmp_path, async_save):
    settings = {
        "parallel__tensor_model_parallel_size": 2,
        "checkpoint__async_save": async_save,
        "checkpoint__save_interval": 3,
        "training__eval_interval": 3,
        "training__train_iters": 6,
    }
    folder = tmp_path / "run"
    train_well(2, write_config("whole", **settings))
    config = write_config("run", **settings)
    keep_only(tmp_path / "whole", folder, 3)
    arguments = ["train", "--config", str(config), "--resume"]
    for code, message in run_ranks(2, train_with_full_disk, arguments):
        lines = [line for line in message.splitlines() if "bitcpm: " in line]
        assert code == 2 and len(lines) == 1, message
        assert f"checkpoint.directory={folder}: cannot be written: File too large" in lines[0]
        assert "Traceback" not in message
    assert tracked(folder) == 3 and find_damage(folder / "iter_0000003") is None
    assert [path.name for path in folder.glob("*iter_*")] == ["iter_0000003"]
    train_well(2, config, "--resume")
    assert numbers(folder, "loss") == numbers(tmp_path / "whole", "loss")
    whole, again = (tensors(run / "iter_0000006") for run in (tmp_path / "whole", folder))
    assert [n for n in whole if not torch.equal(whole[n], again[n])] == []


def moment_of(folder: Path, step: int, delay_s: float) -> Callable[[], bool]:
    """Return the moment so long after this start of a run has logged a step."""
    log = folder / "metrics.jsonl"

    def read() -> tuple[int, int]:
        try:
            steps = re.findall(r'"iteration": (\d+)', log.read_text())
            return log.stat().st_mtime_ns, max(map(int, steps), default=0)
        except FileNotFoundError:
            return 0, 0

    before = read()[0]
    deadline: list[float] = []

    def reached() -> bool:
        changed, newest = read()
        if not deadline and changed != before and newest >= step:
            deadline.append(time.monotonic() + delay_s)
        return bool(deadline) and time.monotonic() >= deadline[0]

    return reached


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("world", "layout", "async_save"),
    [
        (1, {}, False),
        (
            2,
            {
                "parallel__use_distributed_optimizer": True,
                "parallel__overlap_grad_reduce": True,
                "parallel__overlap_param_gather": True,
            },
            True,
        ),
    ],
    ids=["one-rank", "sharded-optimizer-async"],
)
def test_kill_9_at_random_moments(write_config, tmp_path, world, layout, async_save):
    settings = {
        **layout,
        "training__train_iters": 100,
        "training__eval_interval": 25,
        "checkpoint__save_interval": 3,
        "checkpoint__keep_last_n": 2,
        "checkpoint__async_save": async_save,
    }
    train_well(world, write_config("whole", **settings))
    config = write_config("killed", **settings)
    folder = tmp_path / "killed"
    chooser = random.Random(20)
    rows = []
    for kill in range(1, KILLS + 1):
        newest = tracked(folder)
        # The run must not end before the last kill.
        steps, delay_s = (1, 0.0) if newest > 85 else (chooser.randint(1, 7), chooser.random() / 10)
        arguments = ["train", "--config", str(config), *(["--resume"] if newest else [])]
        moment = moment_of(folder, newest + steps, delay_s)
        codes = disturb(world, arguments, moment, signal.SIGKILL)
        assert set(codes) == {-signal.SIGKILL}, codes
        is_writing = any(folder.glob(".tmp-iter*"))
        reached = max(numbers(folder, "loss"))
        rows.append((kill, newest, reached, is_writing, tracked(folder)))
        assert newest <= tracked(folder) <= reached
    print("\nkill  began at  killed at step  while writing  newest complete")
    for row in rows:
        print("{:4d}  {:8d}  {:14d}  {!s:>13}  {:15d}".format(*row))
    assert {row[3] for row in rows} == {True, False}
    train_well(world, config, "--resume")
    assert numbers(folder, "loss") == numbers(tmp_path / "whole", "loss")
    assert numbers(folder, "grad_norm") == numbers(tmp_path / "whole", "grad_norm")
    assert numbers(folder, "valid_loss") == numbers(tmp_path / "whole", "valid_loss")
    whole = tensors(tmp_path / "whole" / "iter_0000100")
    again = tensors(folder / "iter_0000100")
    assert [n for n in whole if not torch.equal(whole[n], again[n])] == []
    assert not list(folder.glob(".tmp*"))
    assert len(metrics(folder)) == len(metrics(tmp_path / "whole"))
