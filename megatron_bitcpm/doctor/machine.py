"""Probes of the machine: processor, memory, disk, programs, threads, torchrun's variables."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_bitcpm.doctor.finding import Finding, absent, ok, problem, warn

GB = 1e9
MIN_MEMORY_GB = 4.0
MIN_DISK_GB = 10.0
MIN_SHM_GB = 1.0


def probe_python(version: tuple[int, int, int], executable: str) -> Finding:
    """Check the interpreter's version."""
    value = ".".join(map(str, version))
    if version < (3, 10):
        fix = "Make an environment with Python 3.11: python3.11 -m venv .venv"
        return problem(value, f"{executable}; 3.10 or newer is needed", fix)
    return ok(value, executable)


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
    return ok(f"{machine}, {cores} core(s)", f"{model}; {sets}")


def probe_system() -> Finding:
    """Name the operating system."""
    if sys.platform == "win32":
        return problem(platform.platform(), "Megatron needs Linux", "Use Linux or WSL")
    return ok(platform.platform())


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
        detail = f"{detail or 'little'}; training keeps 18 bytes a parameter"
        return warn(value, detail, "End other processes, or train a smaller model")
    return ok(value, detail)


def probe_disk(folder: Path) -> Finding:
    """Report the free space where checkpoints would go by default."""
    free = shutil.disk_usage(folder).free
    value = f"{free / GB:.1f} GB free in {folder}"
    if free < MIN_DISK_GB * GB:
        fix = "Free space, or set checkpoint.directory and checkpoint.keep_last_n"
        return warn(value, "a checkpoint takes 14 bytes a parameter", fix)
    return ok(value)


def probe_shared_memory(folder: Path) -> Finding:
    """Check /dev/shm, through which the ranks of a machine exchange data."""
    if not folder.is_dir():
        return warn("absent", f"there is no {folder}", "Mount it: mount -t tmpfs tmpfs /dev/shm")
    total = shutil.disk_usage(folder).total
    value = f"{total / GB:.2f} GB in {folder}"
    if total < MIN_SHM_GB * GB:
        fix = "Start the container with --shm-size=16g or --ipc=host"
        return warn(value, "several ranks may run out of it", fix)
    return ok(value)


def probe_tool(name: str, which: Callable[[str], str | None], use: str, fix: str) -> Finding:
    """Report the path that `which` finds for a program, and its version."""
    path = which(name)
    if path is None:
        return absent("not found", use, fix)
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return problem(path, f"does not run: {error}", fix)
    if done.returncode:
        return problem(path, f"{name} --version ends with exit code {done.returncode}", fix)
    return ok((done.stdout.strip().splitlines() or [""])[0], path)


def probe_threads(environ: Mapping[str, str], cores: int) -> Finding:
    """Compare OMP_NUM_THREADS with the cores of this process."""
    text, text_ranks = environ.get("OMP_NUM_THREADS"), environ.get("LOCAL_WORLD_SIZE", "1")
    ranks = int(text_ranks) if text_ranks.isdigit() else 1
    share = max(1, cores // ranks)
    fix = f"export OMP_NUM_THREADS={share}"
    if not text:
        value = "OMP_NUM_THREADS is not set"
        if ranks > 1 and cores > 1:
            return warn(value, f"each of {ranks} ranks takes all {cores} cores", fix)
        return ok(value, f"all {cores} core(s) are used")
    value = f"OMP_NUM_THREADS={text}"
    # OpenMP allows a list, one number for each level of nesting.
    first = text.split(",")[0].strip()
    if not first.isdigit() or int(first) < 1:
        return problem(value, "is not a number of threads", fix)
    threads = int(first)
    if threads * ranks > cores:
        return warn(value, f"{threads} thread(s) x {ranks} rank(s) share {cores} core(s)", fix)
    if threads < share:
        idle = f"{ranks} rank(s) leave {cores - threads * ranks} of {cores} cores idle"
        return warn(value, f"{idle} (torchrun sets 1 if nothing is set)", fix)
    return ok(value, f"{ranks} rank(s) on {cores} core(s)")


def probe_launcher(environ: Mapping[str, str]) -> Finding:
    """Check the variables that torchrun gives to each rank: all of them, or none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = {name: environ[name] for name in names if environ.get(name)}
    value = " ".join(f"{key}={text}" for key, text in found.items())
    fix = "Start the ranks with torchrun, or unset " + " ".join(found)
    if not found:
        return absent("started by hand: a run would have one rank")
    missing = [name for name in names if name not in found]
    if missing:
        return problem(value, f"without {' '.join(missing)}", fix)
    words = [name for name in names if name != "MASTER_ADDR" and not found[name].isdigit()]
    if words:
        return problem(value, f"{words[0]} is not a number", fix)
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        return problem(value, "RANK is not below WORLD_SIZE", fix)
    return ok(value)
