"""Tensors on their way to disk: read ahead, written at once, flushed all along.

What bounds the memory of every writer here: one tensor is being read or computed while the one
before it is being written, and nothing else is kept.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK_BYTES = 16 << 20
_FLUSH_BYTES = 64 << 20


class FlushedFile:
    """A new binary file whose pages go to disk while it is written, so that closing is short.

    Left to itself the kernel keeps gigabytes of unwritten pages and the final fsync waits for all.
    Any method can raise OSError, also for errors that only flushing shows; `size` is in bytes.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.size = self._position = self._begun = 0

    def __enter__(self) -> FlushedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data` at the current position."""
        data = memoryview(data).cast("B")
        rest = data
        while rest:
            count = os.write(self._descriptor, rest[:_CHUNK_BYTES])
            self._position += count
            self.size = max(self.size, self._position)
            rest = rest[count:]
            if self.size - self._begun >= _FLUSH_BYTES:
                self._begin_flush()
        return len(data)

    def tell(self) -> int:
        """Return the current position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to another position."""
        self._position = os.lseek(self._descriptor, offset, whence)
        return self._position

    def _begin_flush(self) -> None:
        # Linux begins to write dirty pages that it is told not to keep, and does not wait for them;
        # they stay cached until they are clean. It has no other call for that in Python.
        if hasattr(os, "posix_fadvise"):
            begun, length = self._begun, self.size - self._begun
            os.posix_fadvise(self._descriptor, begun, length, os.POSIX_FADV_DONTNEED)
        self._begun = self.size


def read_ahead(items: Iterable[T]) -> Generator[T]:
    """Yield the items, each made in another thread while the one before it is in use.

    At any time there are at most two: the consumer's, which it should let go of before it asks for
    the next, and the one being made or waiting. Close it when leaving early.

    The other thread uses one of torch's threads: reading and writing fill two cores already, and a
    team that waits for a core costs eight times the work of these short operations.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue()
    wanted = threading.Semaphore(1)
    stopped = False
    num_threads = torch.get_num_threads()

    def produce() -> None:
        source = iter(items)
        # Of this thread, and of threads that begin later: those of others stay.
        torch.set_num_threads(1)
        try:
            while True:
                wanted.acquire()
                if stopped:
                    return
                try:
                    item = next(source)
                except StopIteration:
                    break
                ready.put((item, None, False))
                del item
            ready.put((None, None, True))
        except BaseException as error:
            ready.put((None, error, True))
        finally:
            torch.set_num_threads(num_threads)
            if isinstance(source, Generator):
                source.close()

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            wanted.release()
            yield item  # type: ignore[misc]
            del item
    finally:
        stopped = True
        wanted.release()
        thread.join()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """View the memory of a contiguous CPU tensor, little-endian as these machines are."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits; a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    views = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*views)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a type without "torch."."""
    return str(dtype).removeprefix("torch.")


def count_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def cut_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Distribute tensors (bytes) over files in their order; too large ones have their own."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > max_shard_bytes:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards
