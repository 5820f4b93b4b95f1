"""Memory of the ranks: the device's allocator, or the resident set of the process on a CPU."""

from __future__ import annotations

import resource
import sys

import torch

GB = 1e9


def measure_peak_memory_gb(device: torch.device) -> float:
    """Return the most memory of the fullest rank since the start, in 10^9 bytes; collective.

    On an accelerator that is what torch's allocator handed out (not its cache), on a CPU the
    resident set of the process with all its libraries.
    """
    # float32 rounds to one part in 16 million.
    mine = torch.tensor(_peak_bytes(device), dtype=torch.float32, device=device)
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
    return mine.item() / GB


def _peak_bytes(device: torch.device) -> int:
    if device.type != "cpu":
        peak: int = torch.get_device_module(device).max_memory_allocated(device)
        return peak
    import psutil

    # Kilobytes everywhere but on macOS; Linux updates it late.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak, psutil.Process().memory_info().rss)
