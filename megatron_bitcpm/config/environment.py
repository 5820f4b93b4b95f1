"""Every environment variable of the package is read here."""

from __future__ import annotations

import os


def env_cpu_isa() -> str:
    """``BITCPM_CPU_ISA``: the instruction set of the CPU kernels, empty for the best one."""
    return os.environ.get("BITCPM_CPU_ISA", "")


def env_platform() -> str:
    """``BITCPM_PLATFORM``: cpu, cuda or npu, empty to find out."""
    return os.environ.get("BITCPM_PLATFORM", "")
