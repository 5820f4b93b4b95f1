"""Run a function on several gloo ranks of this machine and collect what each returns."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["helpers.preload"])
# Python 3.11's fork server does not take over sys.path, and forgives a preload it cannot import.
_TESTS = str(Path(__file__).parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join([_TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 200) -> list[Any]:
    """Call fn(rank, *args) on `world` ranks; return the results by rank.

    Args:
        world: number of processes.
        fn: a module-level function; its result must pickle.
        timeout_s: for the whole call; then all ranks are killed and the test fails.
    """
    results: Any = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [
            CONTEXT.Process(target=run_one_rank, args=(rank, world, store, results, fn, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            values = _collect(processes, results, world, timeout_s)
            for process in processes:
                process.join(timeout=20)
            return values
        finally:
            for process in processes:
                # The whole session: Megatron's checkpoint code starts helpers of its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()


def _collect(processes: list[Any], results: Any, world: int, timeout_s: float) -> list[Any]:
    values: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(values) < world:
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer from all ranks in {timeout_s} s") from None
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead and results.empty():
                raise AssertionError(f"a rank died with exit code {dead[0]}") from None
            continue
        if error:
            raise AssertionError(f"rank {rank}:\n{error}")
        values[rank] = value
    return [values[rank] for rank in range(world)]


def run_one_rank(
    rank: int, world: int, store: str, results: Any, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.setsid()
    faulthandler.enable(sys.__stderr__)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        value = fn(rank, *args)
        torch.distributed.barrier()
        results.put((rank, value, None))
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
