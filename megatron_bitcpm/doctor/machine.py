"""Probes of the machine: processor, memory, disk, compilers, threads, the launcher's environment.

Every probe takes what it looks at as arguments, so that other machines can be imitated.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_bitcpm.doctor.finding import Finding

GB = 1e9
MIN_MEMORY_GB = 4.0
MIN_DISK_GB = 10.0
MIN_SHM_GB = 1.0

Which = Callable[[str], "str | None"]


def probe_python(version: tuple[int, int, int], executable: str) -> Finding:
    """Check the interpreter's version."""
    value = ".".join(map(str, version))
    if version < (3, 10):
        return Finding(
            "Python",
            "problem",
            value,
            f"{executable}; 3.10 or newer is needed",
            "Make an environment with Python 3.11: python3.11 -m venv .venv",
        )
    return Finding("Python", "ok", value, executable)


def probe_cpu(cpuinfo: Path, machine: str, cores: int) -> Finding:
    """Name the processor and the instruction sets that the operators could use."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    known = ("avx2", "avx512f", "avx512bw", "amx_tile", "asimd", "sve", "sve2", "bf16")
    model = fields.get("model name", fields.get("CPU implementer", "unknown processor"))
    sets = " ".join(name for name in known if name in flags) or "no known vector extensions"
    return Finding("CPU", "ok", f"{machine}, {cores} core(s)", f"{model}; {sets}")


def probe_system() -> Finding:
    """Name the operating system."""
    if sys.platform == "win32":
        return Finding(
            "system", "problem", platform.platform(), "Megatron needs Linux", "Use Linux or WSL"
        )
    return Finding("system", "ok", platform.platform())


def probe_memory(meminfo: Path, cgroup_limit: Path) -> Finding:
    """Report the memory that a process can still get."""
    values = {}
    for line in meminfo.read_text(encoding="utf-8").splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    total, available = values["MemTotal"], values["MemAvailable"]
    detail = ""
    try:
        limit = cgroup_limit.read_text(encoding="utf-8").strip()
    except OSError:
        limit = "max"
    if limit.isdigit() and int(limit) < total:
        total, available = int(limit), min(available, int(limit))
        detail = "limited by the container"
    value = f"{available / GB:.1f} of {total / GB:.1f} GB available"
    if available < MIN_MEMORY_GB * GB:
        return Finding(
            "memory",
            "warn",
            value,
            f"{detail or 'little'}; training keeps 18 bytes a parameter",
            "End other processes, or train a smaller model",
        )
    return Finding("memory", "ok", value, detail)


def probe_disk(folder: Path) -> Finding:
    """Report the free space where checkpoints would go by default."""
    usage = shutil.disk_usage(folder)
    value = f"{usage.free / GB:.1f} GB free in {folder}"
    if usage.free < MIN_DISK_GB * GB:
        return Finding(
            "disk",
            "warn",
            value,
            "a checkpoint takes 14 bytes a parameter",
            "Free space, or set checkpoint.directory and checkpoint.keep_last_n",
        )
    return Finding("disk", "ok", value)


def probe_shared_memory(folder: Path) -> Finding:
    """Check /dev/shm, through which the ranks of a machine exchange data."""
    if not folder.is_dir():
        return Finding(
            "shared memory",
            "warn",
            "absent",
            f"there is no {folder}",
            "Mount it: mount -t tmpfs tmpfs /dev/shm",
        )
    total = shutil.disk_usage(folder).total
    value = f"{total / GB:.2f} GB in {folder}"
    if total < MIN_SHM_GB * GB:
        return Finding(
            "shared memory",
            "warn",
            value,
            "several ranks may run out of it",
            "Start the container with --shm-size=16g or --ipc=host",
        )
    return Finding("shared memory", "ok", value)


def probe_tool(name: str, which: Which, use: str, fix: str) -> Finding:
    """Report a program's path and version.

    Args:
        name: of the program.
        which: finds its path.
        use: what it is needed for.
        fix: how to get it.
    """
    path = which(name)
    if path is None:
        return Finding(name, "absent", "not found", use, fix)
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, "problem", path, f"does not run: {error}", fix)
    if done.returncode:
        detail = f"{name} --version ends with exit code {done.returncode}"
        return Finding(name, "problem", path, detail, fix)
    return Finding(name, "ok", (done.stdout.strip().splitlines() or [""])[0], path)


def probe_threads(environ: Mapping[str, str], cores: int) -> Finding:
    """Compare OMP_NUM_THREADS with the cores of this process."""
    name, text = "threads", environ.get("OMP_NUM_THREADS", "")
    text_ranks = environ.get("LOCAL_WORLD_SIZE", "1")
    ranks = int(text_ranks) if text_ranks.isdigit() else 1
    share = max(1, cores // ranks)
    if not text:
        if ranks > 1 and cores > 1:
            return Finding(
                name,
                "warn",
                "OMP_NUM_THREADS is not set",
                f"each of {ranks} ranks takes all {cores} cores",
                f"export OMP_NUM_THREADS={share}",
            )
        return Finding(name, "ok", "OMP_NUM_THREADS is not set", f"all {cores} core(s) are used")
    value = f"OMP_NUM_THREADS={text}"
    # OpenMP allows a list, one number for each level of nesting.
    first = text.split(",")[0].strip()
    if not first.isdigit() or int(first) < 1:
        return Finding(
            name, "problem", value, "is not a number of threads", f"export OMP_NUM_THREADS={share}"
        )
    threads = int(first)
    if threads * ranks > cores:
        return Finding(
            name,
            "warn",
            value,
            f"{threads} thread(s) x {ranks} rank(s) share {cores} core(s)",
            f"export OMP_NUM_THREADS={share}",
        )
    if threads < share:
        return Finding(
            name,
            "warn",
            value,
            f"{ranks} rank(s) leave {cores - threads * ranks} of {cores} cores idle (torchrun sets "
            "1 if nothing is set)",
            f"export OMP_NUM_THREADS={share}",
        )
    return Finding(name, "ok", value, f"{ranks} rank(s) on {cores} core(s)")


def probe_launcher(environ: Mapping[str, str]) -> Finding:
    """Check the variables that torchrun gives to each rank: all of them, or none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = {name: environ[name] for name in names if environ.get(name)}
    value = " ".join(f"{key}={text}" for key, text in found.items())
    fix = "Start the ranks with torchrun, or unset " + " ".join(found)
    if not found:
        return Finding("torchrun", "absent", "started by hand: a run would have one rank")
    missing = [name for name in names if name not in found]
    if missing:
        return Finding("torchrun", "problem", value, f"without {' '.join(missing)}", fix)
    words = [name for name in names if name != "MASTER_ADDR" and not found[name].isdigit()]
    if words:
        return Finding("torchrun", "problem", value, f"{words[0]} is not a number", fix)
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        return Finding("torchrun", "problem", value, "RANK is not below WORLD_SIZE", fix)
    return Finding("torchrun", "ok", value)
