"""Memory of the ranks: what the device's allocator handed out, or a process's resident set."""

from __future__ import annotations

import resource
import sys

import torch


def measure_peak_memory_gb(device: torch.device) -> float:
    """Return the most memory of the fullest rank since the start, in 10^9 bytes; collective."""
    # float32 rounds to one part in 16 million.
    mine = torch.tensor(_peak_bytes(device), dtype=torch.float32, device=device)
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
    return mine.item() / 1e9


def _peak_bytes(device: torch.device) -> int:
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    import psutil

    # Kilobytes everywhere but on macOS; Linux updates it late.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak, psutil.Process().memory_info().rss)
