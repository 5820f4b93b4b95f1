"""Memory of the ranks: the device's allocator, or the resident set of the process on a CPU."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

GB = 1e9


@dataclass(frozen=True)
class MemoryUse:
    """Memory in GB (10^9 bytes); each number is the largest over ranks.

    Attributes:
        current_gb: in use now.
        peak_gb: most in use since the process started.
    """

    current_gb: float
    peak_gb: float


def measure_memory(device: torch.device) -> MemoryUse:
    """Return the memory of the fullest rank; collective over all ranks.

    On an accelerator that is what torch's allocator handed out (not its cache), on a CPU the
    resident set of the process with all its libraries.

    Args:
        device: this rank's device.
    """
    mine = torch.tensor(_bytes_in_use(device), dtype=torch.float32, device=device)
    # float32 rounds to one part in 16 million.
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
    current, peak = mine.tolist()
    return MemoryUse(current / GB, peak / GB)


def _bytes_in_use(device: torch.device) -> tuple[int, int]:
    if device.type != "cpu":
        allocator = torch.get_device_module(device)
        return allocator.memory_allocated(device), allocator.max_memory_allocated(device)
    import psutil

    now = psutil.Process().memory_info().rss
    # Kilobytes everywhere but on macOS; Linux updates it late.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return now, max(now, peak)
