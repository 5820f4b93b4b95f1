"""Writing a sharded state in three phases, of which the long one may run in a thread.

Megatron writes with processes that it forks, from a program with threads of gloo and OpenMP, and
waits without end for one that was killed; on 0.12 a failure of a writer raises on one rank and the
others hang. Here Megatron only plans what each rank writes and how the index looks; `PlannedSave`
does the rest: `write` in this process, `commit` on all ranks alike.
"""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_bitcpm.checkpoint.safe_load import COMMON_FILE
from megatron_bitcpm.checkpoint.store import write_error
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.parallel.agree import on_all_ranks
from megatron_bitcpm.patching.patch import Patch, PatchSet
from megatron_bitcpm.publish import sync


class PlannedSave:
    """A save whose content is fixed; `write_s` is the time that `write` took on this rank."""

    def __init__(self, folder: Path, writer: Any, metadata: Any) -> None:
        self.folder = folder
        self.write_s = 0.0
        self._writer = writer
        self._metadata = metadata
        self._buckets = list(writer.write_buckets or [])
        writer.write_buckets = None  # the tensors go when they are written
        self._results: list[Any] = []
        self._failure: BaseException | None = None

    def copy_tensors(self) -> None:
        """Copy what will be written, so that training may change the originals."""
        for _, _, (_, tensors) in self._buckets:
            for index, (item, tensor) in enumerate(tensors):
                # One by one: what Megatron copied already goes as its copy comes.
                tensors[index] = (item, tensor.detach().to("cpu", copy=True))

    def write(self) -> None:
        """Write this rank's files and flush them; a failure is kept for `commit`."""
        start = time.perf_counter()
        try:
            for index, (path, key, (data, tensors)) in enumerate(self._buckets):
                bucket = (path, key, (data, [(item, tensor.cpu()) for item, tensor in tensors]))
                self._results += self._write_bucket(index, bucket)
        # Runs in a thread too; `commit` raises it on all ranks.
        except BaseException as failure:
            self._failure = failure
        self._buckets = []
        self.write_s = time.perf_counter() - start

    def _write_bucket(self, index: int, bucket: Any) -> list[Any]:
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        count: queue.Queue[int] = queue.Queue()
        count.put(index)
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, results, count, True)
        _, outcome = results.get_nowait()
        if isinstance(outcome, BaseException):
            raise outcome
        return list(outcome)

    def commit(self) -> None:
        """Write the index once all ranks have written; a failure raises on all. Collective."""
        error = functools.partial(write_error, self.folder.parent)
        on_all_ranks(self._raise_failure, error)
        is_main = torch.distributed.get_rank() == 0
        everyone: list[Any] | None = [None] * torch.distributed.get_world_size()
        torch.distributed.gather_object(self._results, everyone if is_main else None, dst=0)

        def finish() -> None:
            self._writer.finish(self._metadata, everyone)
            save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))

        on_all_ranks(finish, error, main_only=True)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def plan_save(folder: Path, state: dict[str, Any]) -> PlannedSave:
    """Plan the files of Megatron's sharded state, which is changed; write its common part."""
    error = functools.partial(write_error, folder.parent)
    on_all_ranks(lambda: _check_folder(folder), error)
    sharded, common = save_preprocess(state)

    def write_common() -> None:
        with (folder / COMMON_FILE).open("wb") as file:
            torch.save(common, file)
        sync(folder / COMMON_FILE)

    on_all_ranks(write_common, error, main_only=True)
    with _in_process().applied():
        strategy = _PlanOnly("torch_dist", 1, thread_count=1)
        writer, metadata = strategy.async_save(sharded, folder)
    return PlannedSave(folder, writer, metadata)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint.directory={folder.parent}: is not the same folder on all ranks. Name a "
            "folder on a shared file system."
        )


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's way to save up to the point where it would start processes."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        return writer, save_state_dict_ret[1]


def _local_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    return queue.SimpleQueue


@functools.cache
def _in_process() -> PatchSet:
    return PatchSet(
        "writing in process",
        [
            Patch(
                "megatron.core.dist_checkpointing.strategies.filesystem_async:"
                "_get_write_results_queue",
                _local_queue,
                "would start a server process for results that stay in this one",
                "Megatron can write without processes of its own",
                "megatron-core",
            )
        ],
    )
