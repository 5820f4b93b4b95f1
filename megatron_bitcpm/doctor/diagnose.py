"""Runs all probes on this machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

from megatron_bitcpm.doctor import ascend, machine, software
from megatron_bitcpm.doctor.finding import Finding, warn
from megatron_bitcpm.doctor.torch_facts import ask_torch, failure
from megatron_bitcpm.patching.versions import TESTED, version_of

Probe = Callable[[], Finding]

# Program -> what it is needed for, and how to get it.
TOOLS = {
    "g++": ("builds the CPU operators", "apt-get install g++"),
    "cmake": ("builds the Ascend operators", "pip install cmake"),
    "ninja": ("speeds builds up", "pip install ninja"),
    "bisheng": ("CANN's compiler, builds the Ascend operators", ""),
}


def diagnose(environ: Mapping[str, str] | None = None) -> dict[str, Finding]:
    """Look at everything; takes some seconds, because torch is started once or twice.

    `environ` is what to judge and to start torch in; default this process's environment.
    """
    environ = dict(os.environ if environ is None else environ)
    facts = ask_torch(environ)
    facts_without = None
    if failure(facts, "torch"):
        facts_without = ask_torch({**environ, ascend.AUTOLOAD: "0"}, import_only=True)
    torch_npu = software.installed_version(version_of, "torch-npu", "torch_npu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    # Each looks things up only when it runs, so that what fails there is its own finding.
    probes: dict[str, Probe] = {
        "Python": lambda: machine.probe_python(sys.version_info[:3], sys.executable),
        "system": machine.probe_system,
        "CPU": lambda: machine.probe_cpu(Path("/proc/cpuinfo"), platform.machine(), cores),
        "memory": lambda: machine.probe_memory(
            Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
        ),
        "shared memory": lambda: machine.probe_shared_memory(Path("/dev/shm")),
        "disk": lambda: machine.probe_disk(Path.cwd()),
        "threads": lambda: machine.probe_threads(environ, cores),
        "torch": lambda: software.probe_torch(
            facts, software.installed_version(version_of, "torch")
        ),
        "backend autoload": lambda: ascend.probe_autoload(
            environ, list(metadata.entry_points(group="torch.backends").names), facts, facts_without
        ),
        "megatron-core": lambda: software.probe_megatron(
            version_of, TESTED, _location("megatron.core")
        ),
        "requirements": lambda: software.probe_requirements(
            metadata.requires("megatron-bitcpm") or [], version_of
        ),
        "operators": lambda: software.probe_operators(facts),
        "variables": lambda: software.probe_variables(environ, facts),
        "devices": lambda: ascend.probe_devices(environ, facts),
        "collectives": lambda: software.probe_collectives(facts),
        "torchrun": lambda: machine.probe_launcher(environ),
        "CANN": lambda: ascend.probe_cann(environ, os.getuid(), torch_npu is not None),
        "NPU driver": lambda: ascend.probe_driver(
            shutil.which("npu-smi"), sorted(Path("/dev").glob("davinci[0-9]*"))
        ),
        "torch_npu": lambda: ascend.probe_torch_npu(facts, torch_npu),
        "NPU operators": lambda: ascend.probe_npu_operators(facts),
        "MindSpeed": lambda: software.probe_mindspeed(version_of, _location("mindspeed")),
        "apex": lambda: software.probe_apex(version_of, _location("apex")),
        "Transformer Engine": lambda: software.probe_transformer_engine(version_of),
    }
    for name, (use, fix) in TOOLS.items():
        probes[name] = partial(machine.probe_tool, name, shutil.which, use, fix)
    return {name: _survive(probe) for name, probe in probes.items()}


def _survive(probe: Probe) -> Finding:
    try:
        return probe()
    except Exception as error:
        detail = f"the probe failed: {type(error).__name__}: {error}"
        return warn("unknown", detail, "Look at it by hand")


def _location(module: str) -> Path | None:
    """Return the folder of a package without importing it (its parents are)."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    folders = (spec and spec.submodule_search_locations) or ()
    return next(map(Path, folders), None)
