"""Probes of Python packages: torch, Megatron, what is optional, our operators and variables."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from megatron_bitcpm.doctor.finding import Finding
from megatron_bitcpm.doctor.torch_facts import Facts, failure

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
    """Check that torch can be imported.

    Args:
        facts: see `torch_facts.ask_torch`.
        installed: version by its metadata.
    """
    if installed is None and failure(facts, "torch"):
        return Finding("torch", "problem", "not installed", "", "pip install torch")
    why = failure(facts, "torch")
    if why:
        return Finding(
            "torch",
            "problem",
            installed or "unknown version",
            f"cannot be imported: {why}",
            "See `backend autoload`; otherwise: pip install --force-reinstall torch",
        )
    found = facts["torch"]
    return Finding("torch", "ok", found["version"], f"{found['file']}; {found['threads']} threads")


def probe_megatron(version_of: VersionOf, tested: tuple[str, ...], location: str | None) -> Finding:
    """Check megatron-core's version.

    Args:
        version_of: looks up distributions.
        tested: beginnings of the versions that were tested.
        location: the folder that ``import megatron.core`` would take.
    """
    name, wanted = "megatron-core", "pip install megatron-core==0.16.1"
    version = installed_version(version_of, "megatron-core")
    if version is None:
        detail = f"without metadata, in {location}" if location else ""
        return Finding(name, "problem", "not installed", detail, wanted)
    if not version.startswith(tested):
        return Finding(
            name, "problem", version, f"not among the tested versions {', '.join(tested)}", wanted
        )
    if location is None:
        return Finding(name, "problem", version, "megatron.core is not found", wanted)
    return Finding(name, "ok", version, f"tested; {location}")


def probe_requirements(requirements: list[str], version_of: VersionOf) -> Finding:
    """Compare what the package declares with what is installed.

    Args:
        requirements: as in the metadata, with markers.
        version_of: looks up distributions.
    """
    from packaging.requirements import Requirement

    broken = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.name in _PROBED_APART:
            continue
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(version_of, wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            broken.append(f"{wanted.name}{wanted.specifier} ({version or 'absent'})")
    if broken:
        names = " ".join(f'"{entry.split(" (")[0]}"' for entry in broken)
        return Finding(
            "requirements",
            "problem",
            f"{len(broken)} not met",
            ", ".join(broken),
            f"pip install {names}",
        )
    return Finding("requirements", "ok", "all met")


def probe_apex(version_of: VersionOf, location: Path | None) -> Finding:
    """Tell NVIDIA's or Ascend's apex from the web toolkit of that name in the registry.

    Args:
        version_of: looks up distributions.
        location: the folder that ``import apex`` would take.
    """
    version = installed_version(version_of, "apex")
    if location is None:
        return Finding("apex", "absent", "not installed", "torch's own AdamW and norms are used")
    # Both accelerator builds have these folders; the web toolkit has neither.
    if (location / "optimizers").is_dir() or (location / "amp").is_dir():
        return Finding("apex", "ok", version or "unknown version", str(location))
    return Finding(
        "apex",
        "problem",
        version or "unknown version",
        f"{location} is an unrelated web toolkit; libraries that look for apex take it for "
        "NVIDIA's",
        "pip uninstall apex; build NVIDIA's or Ascend's from source if you need it",
    )


def probe_mindspeed(version_of: VersionOf, location: Path | None) -> Finding:
    """Report MindSpeed, and whether it meets the Megatron that it stands on.

    Args:
        version_of: looks up distributions.
        location: the folder that ``import mindspeed`` would take.
    """
    if location is None:
        return Finding("MindSpeed", "absent", "not installed", "runs do without")
    value = installed_version(version_of, "mindspeed") or "unknown version"
    core = installed_version(version_of, "megatron-core")
    if core is not None and not core.startswith("0.12."):
        return Finding(
            "MindSpeed",
            "warn",
            value,
            f"its tested release stands on megatron-core 0.12.1, this is {core}",
            "pip install megatron-core==0.12.1",
        )
    return Finding("MindSpeed", "ok", value, str(location))


def probe_transformer_engine(version_of: VersionOf) -> Finding:
    """Report Transformer Engine."""
    version = installed_version(version_of, "transformer-engine", "transformer_engine")
    if version is None:
        return Finding("Transformer Engine", "absent", "not installed", "runs do without")
    return Finding("Transformer Engine", "ok", version)


def probe_operators(facts: Facts) -> Finding:
    """Say which implementation of the ternary operators is live here, and why.

    Args:
        facts: see `torch_facts.ask_torch`.
    """
    name, report = "operators", facts.get("operators")
    if report is None:
        return Finding(
            name, "problem", "unknown", "torch cannot be imported, and they need it", "See `torch`"
        )
    why = failure(facts, "operators")
    if why:
        return Finding(name, "problem", "unusable", why, "See `variables`, or reinstall")
    platform = facts.get("platform")
    device = platform if platform in ("cuda", "npu") else "cpu"
    live = report.get(device, report["other"])
    value = f"{live['backend']} on {device}"
    if live.get("isa"):
        value += f", {live['isa']}"
    detail = live["reason"] + (f" ({live['load_error']})" if live.get("load_error") else "")
    if live["backend"] != "reference":
        return Finding(name, "ok", value, "; ".join([detail, *_list_compiled(live)]))
    fixes = {
        "cpu": "Install g++, then: pip install --no-deps --no-build-isolation --force-reinstall "
        "-e .",
        "npu": "See docs/ascend.md; the reference gives the same bits, slower",
    }
    other = "None needed for the results: the reference gives the same bits, slower"
    return Finding(name, "warn", value, detail, fixes.get(device, other))


def _list_compiled(live: Mapping[str, Any]) -> list[str]:
    """Return what an entry of `ops.backend_report` says of its compiled module, for the table."""
    found = {
        "this processor": live.get("isas"),
        "compiled": live.get("ops"),
        "grids": live.get("grids"),
    }
    return [f"{key}: {' '.join(names)}" for key, names in found.items() if names]


def probe_variables(environ: Mapping[str, str], facts: Facts) -> Finding:
    """Check the package's own environment variables.

    Args:
        environ: the environment.
        facts: see `torch_facts.ask_torch`; their values were tried there.
    """
    name = "variables"
    found = {key: text for key, text in environ.items() if key.startswith("BITCPM_")}
    if not found:
        return Finding(name, "absent", "no BITCPM_* variable is set")
    value = " ".join(f"{key}={text}" for key, text in sorted(found.items()))
    for key in sorted(found):
        if key not in VARIABLES:
            near = difflib.get_close_matches(key, VARIABLES, 1)
            fix = f"unset {key}" + (f", or use {near[0]}" if near else "")
            return Finding(name, "warn", value, f"{key} has no meaning", fix)
    tried = (("platform", "BITCPM_PLATFORM"), ("operators", "BITCPM_CPU_ISA"))
    bad = {key: failure(facts, fact) for fact, key in tried if key in found}
    reasons = {key: why for key, why in bad.items() if why and key in why}
    if reasons:
        return Finding(
            name, "problem", value, "; ".join(reasons.values()), f"unset {' '.join(reasons)}"
        )
    return Finding(name, "ok", value)


def probe_collectives(facts: Facts) -> Finding:
    """Check the libraries through which ranks talk.

    Args:
        facts: see `torch_facts.ask_torch`.
    """
    name, found = "collectives", facts.get("collectives")
    if not isinstance(found, list):
        why = failure(facts, "collectives") or "torch cannot be imported"
        return Finding(name, "problem", "unknown", why, "See `torch`")
    value = " ".join(found) or "none"
    wanted = {"npu": "hccl", "cuda": "nccl"}.get(str(facts.get("platform")), "gloo")
    if wanted not in found:
        return Finding(
            name, "problem", value, f"{wanted} is missing", "Install a torch build that has it"
        )
    why = failure(facts, "gloo")
    if why:
        return Finding(
            name,
            "problem",
            value,
            f"gloo does not start: {why}",
            "Put the host name into /etc/hosts, or export GLOO_SOCKET_IFNAME=lo",
        )
    return Finding(name, "ok", value, "gloo was started")
