"""Saving the checkpoints of a run: at once, or in the background while training goes on.

In the background, training waits only while its state is copied to host memory (this rank's part of
it); a thread writes the copy. `poll`, called after each step, publishes it when every rank has
written. One save is in flight at most: the next one waits.
"""

from __future__ import annotations

import functools
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.checkpoint.retention import delete_surplus
from megatron_bitcpm.checkpoint.state import begin_save
from megatron_bitcpm.checkpoint.store import (
    begin_checkpoint,
    iteration_name,
    publish_checkpoint,
    scratch_folder,
    write_error,
)
from megatron_bitcpm.checkpoint.writer import PlannedSave
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.parallel.agree import on_all_ranks


@dataclass(frozen=True)
class SaveReport:
    """A published checkpoint, with how long this rank held training and wrote files, in seconds."""

    iteration: int
    folder: Path
    stall_s: float
    write_s: float


@dataclass
class _InFlight:
    iteration: int
    planned: PlannedSave
    facts: dict[str, Any]
    stall_s: float
    thread: threading.Thread | None = None


class CheckpointSaver:
    """Writes and deletes checkpoints of one run; methods are collective and fail on all ranks."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config = config
        self._run_dir = Path(config.checkpoint.directory)
        self._device = device
        self._in_flight: _InFlight | None = None
        self._error = functools.partial(write_error, self._run_dir)

    def save(
        self,
        chunks: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        progress: dict[str, Any],
        facts: dict[str, Any],
    ) -> list[SaveReport]:
        """Write a checkpoint, or begin to where ``checkpoint.async_save`` is set; see `begin_save`.

        The latent weights must be in the model only during this call. `facts` are the contents of
        ``bitcpm_state.json``, alike on all ranks. Returns what was published: an earlier save that
        was in flight; this one if not asynchronous.
        """
        reports = list(filter(None, [self.finish()]))
        start = time.perf_counter()
        iteration = progress["iteration"]
        with self._discarding(iteration):
            on_all_ranks(
                lambda: begin_checkpoint(self._run_dir, iteration), self._error, main_only=True
            )
            folder = scratch_folder(self._run_dir, iteration)
            planned = begin_save(folder, chunks, optimizer, scheduler, progress)
            flight = _InFlight(iteration, planned, dict(facts), 0.0)
            if self._config.checkpoint.async_save:
                planned.copy_tensors()
                flight.thread = threading.Thread(target=planned.write, daemon=True)
                flight.thread.start()
        self._in_flight = flight
        flight.stall_s = time.perf_counter() - start
        if flight.thread is None:
            start = time.perf_counter()
            planned.write()
            flight.stall_s += time.perf_counter() - start
            reports.append(self._publish(flight))
        return reports

    def poll(self) -> SaveReport | None:
        """Publish the save in flight if all ranks have written it; cheap, call it every step."""
        flight = self._in_flight
        if flight is None:
            return None
        assert flight.thread is not None
        done = torch.tensor(int(not flight.thread.is_alive()), device=self._device)
        torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
        return self._publish(flight) if int(done) else None

    def finish(self) -> SaveReport | None:
        """Wait for the save in flight and publish it; call it before the run ends."""
        flight = self._in_flight
        if flight is None:
            return None
        start = time.perf_counter()
        if flight.thread is not None:
            flight.thread.join()
        flight.stall_s += time.perf_counter() - start
        return self._publish(flight)

    def _publish(self, flight: _InFlight) -> SaveReport:
        start = time.perf_counter()
        self._in_flight = None
        with self._discarding(flight.iteration):
            flight.planned.commit()
            on_all_ranks(lambda: self._publish_here(flight), self._error, main_only=True)
        return SaveReport(
            flight.iteration,
            self._run_dir / iteration_name(flight.iteration),
            flight.stall_s + time.perf_counter() - start,
            flight.planned.write_s,
        )

    def _publish_here(self, flight: _InFlight) -> None:
        publish_checkpoint(
            flight.planned.folder, self._run_dir, flight.iteration, self._config, flight.facts
        )
        keep = self._config.checkpoint
        delete_surplus(self._run_dir, flight.iteration, keep.keep_last_n, keep.keep_every_n)

    @contextmanager
    def _discarding(self, iteration: int) -> Iterator[None]:
        """Remove what was written if the block fails, which it does on all ranks alike."""
        try:
            yield
        except CheckpointError:
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(scratch_folder(self._run_dir, iteration), ignore_errors=True)
            raise
