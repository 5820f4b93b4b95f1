"""Every environment variable of the package is read here."""

from __future__ import annotations

import os


def env_cpu_isa() -> str:
    """``BITCPM_CPU_ISA``: the instruction set of the CPU kernels, empty for the best one."""
    return os.environ.get("BITCPM_CPU_ISA", "")


def env_platform() -> str:
    """``BITCPM_PLATFORM``: cpu, cuda or npu, empty to find out."""
    return os.environ.get("BITCPM_PLATFORM", "")


def env_world_size() -> int:
    """torchrun's ``WORLD_SIZE``; 1 when started by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def env_rank() -> int:
    """torchrun's ``RANK``; 0 when started by hand."""
    return int(os.environ.get("RANK", "0"))


def env_local_rank() -> int:
    """torchrun's ``LOCAL_RANK``: the device of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
