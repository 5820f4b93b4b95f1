"""Probes of Python packages: torch, Megatron, what is optional, our operators and variables."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from megatron_bitcpm.doctor.finding import Finding, absent, ok, problem, warn
from megatron_bitcpm.doctor.torch_facts import Facts, failure, reason_of

VersionOf = Callable[[str], str]
"""As `importlib.metadata.version`: raises PackageNotFoundError."""

# Of the package's own variables: read at run time, and read by setup.py.
VARIABLES = (
    "BITCPM_CPU_ISA",
    "BITCPM_PLATFORM",
    "BITCPM_REQUIRE_BACKENDS",
    "BITCPM_REQUIRE_NATIVE",
    "BITCPM_REQUIRE_NPU",
)
# Have probes of their own.
_PROBED_APART = ("torch", "megatron-core", "torch-npu")


def installed_version(version_of: VersionOf, *names: str) -> str | None:
    """Return the version of the first of some distributions that is installed, or None."""
    for name in names:
        try:
            return version_of(name)
        except PackageNotFoundError:
            continue
    return None


def probe_torch(facts: Facts, installed: str | None) -> Finding:
    """Check that torch, `installed` by its metadata, can be imported."""
    why = failure(facts, "torch")
    if why and installed is None:
        return problem("not installed", "", "pip install torch")
    if why:
        fix = "See `backend autoload`; otherwise: pip install --force-reinstall torch"
        return problem(installed or "unknown version", f"cannot be imported: {why}", fix)
    found = facts["torch"]
    return ok(found["version"], f"{found['file']}; {found['threads']} threads")


def probe_megatron(
    version_of: VersionOf, tested: tuple[str, ...], location: Path | None
) -> Finding:
    """Check megatron-core's version; `tested` has beginnings of versions."""
    fix = "pip install megatron-core==0.16.1"
    version = installed_version(version_of, "megatron-core")
    if version is None:
        detail = f"without metadata, in {location}" if location else ""
        return problem("not installed", detail, fix)
    if not version.startswith(tested):
        return problem(version, f"not among the tested versions {', '.join(tested)}", fix)
    if location is None:
        return problem(version, "megatron.core is not found", fix)
    return ok(version, f"tested; {location}")


def probe_requirements(requirements: list[str], version_of: VersionOf) -> Finding:
    """Compare what the package declares, as in its metadata, with what is installed."""
    from packaging.requirements import Requirement

    broken = {}
    for wanted in map(Requirement, requirements):
        is_extra = wanted.marker and not wanted.marker.evaluate({"extra": ""})
        if is_extra or wanted.name in _PROBED_APART:
            continue
        version = installed_version(version_of, wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            broken[f"{wanted.name}{wanted.specifier}"] = version or "absent"
    if broken:
        detail = ", ".join(f"{wanted} ({version})" for wanted, version in broken.items())
        fix = "pip install " + " ".join(f'"{wanted}"' for wanted in broken)
        return problem(f"{len(broken)} not met", detail, fix)
    return ok("all met")


def probe_apex(version_of: VersionOf, location: Path | None) -> Finding:
    """Tell NVIDIA's or Ascend's apex from the web toolkit of that name in the registry."""
    version = installed_version(version_of, "apex") or "unknown version"
    if location is None:
        return absent("not installed", "torch's own AdamW and norms are used")
    # Both accelerator builds have these folders; the web toolkit has neither.
    if (location / "optimizers").is_dir() or (location / "amp").is_dir():
        return ok(version, str(location))
    return problem(
        version,
        f"{location} is an unrelated web toolkit; libraries that look for apex take it for "
        "NVIDIA's",
        "pip uninstall apex; build NVIDIA's or Ascend's from source if you need it",
    )


def probe_mindspeed(version_of: VersionOf, location: Path | None) -> Finding:
    """Report MindSpeed, and whether it meets the Megatron that it stands on."""
    if location is None:
        return absent("not installed", "runs do without")
    value = installed_version(version_of, "mindspeed") or "unknown version"
    core = installed_version(version_of, "megatron-core")
    if core is not None and not core.startswith("0.12."):
        detail = f"its tested release stands on megatron-core 0.12.1, this is {core}"
        return warn(value, detail, "pip install megatron-core==0.12.1")
    return ok(value, str(location))


def probe_transformer_engine(version_of: VersionOf) -> Finding:
    """Report Transformer Engine."""
    version = installed_version(version_of, "transformer-engine", "transformer_engine")
    return ok(version) if version else absent("not installed", "runs do without")


def probe_operators(facts: Facts) -> Finding:
    """Say which implementation of the ternary operators is live here, and why."""
    report = facts.get("operators")
    if report is None:
        return problem("unknown", "torch cannot be imported, and they need it", "See `torch`")
    if why := failure(facts, "operators"):
        return problem("unusable", why, "See `variables`, or reinstall")
    platform = facts.get("platform")
    device = platform if platform in ("cuda", "npu") else "cpu"
    live = report.get(device, report["other"])
    value = f"{live['backend']} on {device}"
    if live.get("isa"):
        value += f", {live['isa']}"
    detail = reason_of(live)
    if live["backend"] != "reference":
        return ok(value, "; ".join([detail, *_list_compiled(live)]))
    fixes = {
        "cpu": "Install g++, then: pip install --no-deps --no-build-isolation --force-reinstall "
        "-e .",
        "npu": "See docs/ascend.md; the reference gives the same bits, slower",
    }
    other = "None needed for the results: the reference gives the same bits, slower"
    return warn(value, detail, fixes.get(device, other))


def _list_compiled(live: Mapping[str, Any]) -> list[str]:
    """Return what an entry of `ops.backend_report` says of its compiled module, for the table."""
    titles = {"isas": "this processor", "ops": "compiled", "grids": "grids"}
    return [f"{title}: {' '.join(live[key])}" for key, title in titles.items() if live.get(key)]


def probe_variables(environ: Mapping[str, str], facts: Facts) -> Finding:
    """Check the package's own environment variables, whose values were tried for `facts`."""
    found = {key: text for key, text in sorted(environ.items()) if key.startswith("BITCPM_")}
    if not found:
        return absent("no BITCPM_* variable is set")
    value = " ".join(f"{key}={text}" for key, text in found.items())
    for key in found:
        if key not in VARIABLES:
            near = difflib.get_close_matches(key, VARIABLES, 1)
            fix = f"unset {key}" + (f", or use {near[0]}" if near else "")
            return warn(value, f"{key} has no meaning", fix)
    tried = (("platform", "BITCPM_PLATFORM"), ("operators", "BITCPM_CPU_ISA"))
    bad = {key: failure(facts, fact) for fact, key in tried if key in found}
    reasons = {key: why for key, why in bad.items() if why and key in why}
    if reasons:
        return problem(value, "; ".join(reasons.values()), f"unset {' '.join(reasons)}")
    return ok(value)


def probe_collectives(facts: Facts) -> Finding:
    """Check the libraries through which ranks talk."""
    found = facts.get("collectives")
    if not isinstance(found, list):
        reason = failure(facts, "collectives") or "torch cannot be imported"
        return problem("unknown", reason, "See `torch`")
    value = " ".join(found) or "none"
    wanted = {"npu": "hccl", "cuda": "nccl"}.get(str(facts.get("platform")), "gloo")
    if wanted not in found:
        return problem(value, f"{wanted} is missing", "Install a torch build that has it")
    if why := failure(facts, "gloo"):
        fix = "Put the host name into /etc/hosts, or export GLOO_SOCKET_IFNAME=lo"
        return problem(value, f"gloo does not start: {why}", fix)
    return ok(value, "gloo was started")
