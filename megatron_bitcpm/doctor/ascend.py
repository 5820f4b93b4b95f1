"""Probes of an Ascend machine: CANN, driver, torch_npu, the devices that a process sees."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_bitcpm.doctor.finding import Finding, absent, ok, problem, warn
from megatron_bitcpm.doctor.torch_facts import Facts, failure, reason_of

HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
USUAL_HOMES = (
    Path("/usr/local/Ascend/ascend-toolkit/latest"),
    Path.home() / "Ascend/ascend-toolkit/latest",
)
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
SOURCE_CANN = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"


def probe_cann(
    environ: Mapping[str, str],
    uid: int,
    has_torch_npu: bool,
    usual_homes: tuple[Path, ...] = USUAL_HOMES,
    can_read: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.X_OK),
) -> Finding:
    """Find the CANN toolkit, its version and whether the user `uid` may use it.

    It is looked for in `usual_homes` when `environ` names none; only torch_npu needs it.
    """
    variable = next((name for name in HOME_VARIABLES if environ.get(name)), None)
    if variable is None:
        return _find_unsourced_cann(has_torch_npu, usual_homes)
    home = Path(environ[variable])
    if not home.is_dir():
        fix = f"Install CANN there, or: {SOURCE_CANN}"
        return problem(f"{variable}={home}", "there is no such folder", fix)
    owner_uid = home.stat().st_uid
    owner, user = _user_name(owner_uid), _user_name(uid)
    if not can_read(home):
        fix = "Let its owner run: chmod -R o+rX, or install CANN with --install-for-all"
        return problem(str(home), f"owned by {owner}, and {user} may not read it", fix)
    version = read_cann_version(home) or "unknown version"
    if owner_uid != uid:
        # CANN and torch_npu only warn about it, once for every process.
        return warn(
            version,
            f"{home} is owned by {owner}, this is {user}: it works, with a warning that the owner "
            "does not match the current owner",
            f"Run as {owner}, or install CANN as {user}",
        )
    return ok(version, str(home))


def _find_unsourced_cann(has_torch_npu: bool, usual_homes: tuple[Path, ...]) -> Finding:
    installed = next((home for home in usual_homes if home.is_dir()), None)
    if installed is not None:
        judge = problem if has_torch_npu else warn
        detail = f"installed in {installed}, but {HOME_VARIABLES[0]} is not set"
        return judge("not in the environment", detail, f"source {installed.parent}/set_env.sh")
    if has_torch_npu:
        fix = f"Install the CANN toolkit and kernels, then: {SOURCE_CANN}"
        return problem("not found", "torch_npu is installed and cannot work without it", fix)
    return absent("not found", "only NPUs need it")


def read_cann_version(home: Path) -> str | None:
    """Return the version that the CANN in ``ASCEND_HOME_PATH`` states about itself."""
    patterns = ("*-linux/ascend_*_install.info", "ascend_*_install.info", "*/version.info")
    for path in (path for pattern in patterns for path in sorted(home.glob(pattern))):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found = re.search(r"^version\s*=\s*\[?([\w.]+)", text, re.MULTILINE | re.IGNORECASE)
        if found:
            return found[1]
    return None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def probe_driver(npu_smi: str | None, device_files: list[Path]) -> Finding:
    """Check whether the NPU driver is here: its tool, and ``/dev/davinci0`` and so on."""
    count = f"{len(device_files)} device file(s)"
    if npu_smi and device_files:
        return ok(count, npu_smi)
    if device_files:
        fix = "Mount /usr/local/Ascend/driver and npu-smi into the container"
        return warn(count, "npu-smi is not found", fix)
    if npu_smi:
        return problem(
            npu_smi,
            "there is no /dev/davinci*",
            "Start the container with --device /dev/davinci0 --device /dev/davinci_manager "
            "--device /dev/hisi_hdc, or load the driver",
        )
    return absent("no NPU on this machine")


def probe_autoload(
    environ: Mapping[str, str], autoloaded: list[str], facts: Facts, facts_without: Facts | None
) -> Finding:
    """Tell whether importing torch loads a device's library with it, and dies of that.

    `autoloaded` names the entry points in the group ``torch.backends``; `facts_without` was asked
    with that loading switched off, when torch failed.
    """
    if environ.get(AUTOLOAD) == "0":
        return ok("off", f"{AUTOLOAD}=0")
    if not autoloaded:
        return ok("nothing to load")
    names = ", ".join(autoloaded)
    if failure(facts, "torch") and facts_without and not failure(facts_without, "torch"):
        fix = f"{SOURCE_CANN}; on a machine without NPU: export {AUTOLOAD}=0"
        return problem(names, "`import torch` loads it and fails; without it torch works", fix)
    return ok(names, "loaded by `import torch`")


def probe_torch_npu(facts: Facts, installed: str | None) -> Finding:
    """Check that torch_npu, `installed` by its metadata, loads and belongs to this torch."""
    npu, why = facts.get("npu"), failure(facts, "npu")
    if npu is None and installed is None:
        return absent("not installed", "only NPUs need it")
    if npu is None or why:
        why = why or "torch cannot be imported, so it could not be tried"
        fix = f"{SOURCE_CANN}; or install the release that fits this torch"
        return problem(installed or "unknown version", why, fix)
    torch_version = re.match(r"[\d.]+", facts["torch"]["version"])
    npu_version = re.match(r"\d+\.\d+\.\d+", npu["version"])
    if torch_version and npu_version and torch_version[0].rstrip(".") != npu_version[0]:
        detail = f"made for torch {npu_version[0]}, this is torch {facts['torch']['version']}"
        fix = f"pip install torch=={npu_version[0]}, or another torch_npu"
        return problem(npu["version"], detail, fix)
    return ok(npu["version"])


def probe_npu_operators(facts: Facts) -> Finding:
    """Say whether the compiled NPU operators loaded, and for which device."""
    report = facts.get("operators")
    live = report.get("npu") if isinstance(report, dict) else None
    if live is None:
        return absent("unknown", "see `operators`")
    if not isinstance(facts.get("npu"), dict):
        return absent("not loaded", live["reason"])
    if live["backend"] == "reference":
        fix = "Build them as docs/ascend.md says; the reference gives the same bits, slower"
        return warn("reference", reason_of(live), fix)
    device = live["device"]
    value = f"native, {device['vector_cores']} vector cores, {device['ub_bytes']} bytes each"
    return ok(value, f"compiled: {' '.join(live['ops'])}; others: reference")


def probe_devices(environ: Mapping[str, str], facts: Facts) -> Finding:
    """Count the devices that torch sees, and say why there are none."""
    npu, cuda = facts.get("npu"), facts.get("cuda")
    local_world = environ.get("LOCAL_WORLD_SIZE", "1")
    if isinstance(npu, dict):
        if npu["device_count"]:
            return _check_ranks("NPU", npu["device_count"], local_world)
        usable = "is_available() says True all the same" if npu["is_available"] else "none usable"
        if VISIBLE in environ:
            return problem(
                "0 NPU(s)",
                f"{VISIBLE}={environ[VISIBLE] or '(empty)'} hides all: it must name devices of "
                f"this machine or container, counted from 0; {usable}",
                f"unset {VISIBLE}, or use numbers that `npu-smi info` shows",
            )
        return problem(
            "0 NPU(s)",
            f"torch_npu sees no device; {usable}",
            "Check `npu-smi info`, the container's --device options, and that the user is in the "
            "group HwHiAiUser",
        )
    if isinstance(cuda, dict) and cuda["device_count"]:
        return _check_ranks("GPU", cuda["device_count"], local_world)
    if failure(facts, "torch"):
        return absent("unknown", "torch cannot be imported")
    return ok("CPU only", "no NPU and no GPU; runs use gloo on the CPU")


def _check_ranks(kind: str, count: int, local_world: str) -> Finding:
    value = f"{count} {kind}(s)"
    if local_world.isdigit() and int(local_world) > count:
        detail = f"{local_world} ranks were started on this machine"
        return problem(value, detail, f"torchrun --nproc_per_node {count}")
    return ok(value)
