"""Which implementation runs: the configuration value `quant.backend`, and a report of what is live.

Each device with kernels of its own has a module here, `_cpu` and `_npu`, with `enabled`,
`is_loaded`, `load_error`, `describe_details`, and the `NAMES` of operators and the `GRIDS` that are
compiled. Every other device runs the reference.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_bitcpm.errors import BackendError
from megatron_bitcpm.ops import _cpu, _npu
from megatron_bitcpm.quant.grids import TERNARY

_DEVICES: dict[str, Any] = {"cpu": _cpu, "npu": _npu}
_FIXES = {
    "cpu": "Reinstall with a C++ compiler, or use auto",
    "npu": "See docs/ascend.md, or use auto",
}
# The one way in which a module is absent without an error; that of the CPU is loaded at once.
_NOT_IMPORTED = "torch_npu is not imported in this process"
_requested = "auto"


def use_backend(
    name: str, device_type: str = "cpu", grid: str = TERNARY, activation: str = "none"
) -> None:
    """Choose the implementation, the configuration value `quant.backend`.

    "auto" takes a device's compiled kernels where there are any, "reference" pure torch everywhere,
    "native" compiled kernels. Raises BackendError for another name, and where "native" does not
    hold for `device_type` ("cpu", "cuda", "npu"), `quant.grid` and `quant.activation`.
    """
    global _requested
    if name not in ("auto", "reference", "native"):
        raise BackendError(
            f"quant.backend={name}: is not a backend. Use auto, reference or native."
        )
    if name == "native":
        _require_native(device_type, grid, activation)
    _requested = name
    for module in _DEVICES.values():
        module.enabled = name != "reference"


def _require_native(device_type: str, grid: str, activation: str) -> None:
    module = _DEVICES.get(device_type)
    if module is None:
        problem, fix = f"there are no compiled operators for {device_type}", "Use auto"
    elif not module.is_loaded():
        problem, fix = _NOT_IMPORTED, _FIXES[device_type]
        if module.load_error:
            device = device_type.upper()
            problem = f"the compiled {device} operators did not load ({module.load_error})"
    elif missing := _find_uncompiled(module.NAMES, module.GRIDS, grid, activation):
        problem, fix = f"no compiled operators for {missing[0]} on {device_type}", "Use auto"
    else:
        return
    raise BackendError(f"quant.backend=native: {problem}. {fix}.")


def _find_uncompiled(
    names: Collection[str], grids: Collection[str], grid: str, activation: str
) -> list[str]:
    """Return the configuration values that the compiled operators and grids do not serve."""
    missing = [] if grid in grids else [f"quant.grid {grid}"]
    if activation != "none" and activation not in names:
        missing.append(f"quant.activation {activation}")
    return missing


def describe_backend(device_type: str, grid: str = TERNARY, activation: str = "none") -> str:
    """Say in a few words what runs for weights and activations on a device, and why."""
    report = backend_report()
    found = report.get(device_type, report["other"])
    backend, reason = found["backend"], found["reason"]
    if backend == "reference":
        return f"reference on {device_type} ({reason})"
    missing = _find_uncompiled(found["ops"], found["grids"], grid, activation)
    if not missing:
        return f"{backend} on {device_type} ({reason})"
    why = f"no compiled operators for {' and '.join(missing)}"
    if grid in found["grids"]:
        return f"{backend} for weights, reference for activations on {device_type} ({why})"
    return f"reference on {device_type} ({why})"


def backend_report() -> dict[str, Any]:
    """Say which implementation each device has, and why; JSON-able.

    Keys: `requested`, the name of the last `use_backend`; `cpu` and `npu`: backend ("native" or
    "reference"), reason, load_error, the compiled ops and grids, and for the CPU the isa in use and
    the isas to choose from, for the NPU the device; `other`: backend and reason elsewhere.
    """
    return {
        "requested": _requested,
        **{name: _report(module) for name, module in _DEVICES.items()},
        "other": {"backend": "reference", "reason": "no compiled kernels for other devices"},
    }


def _report(module: Any) -> dict[str, Any]:
    loaded = module.is_loaded()
    live = loaded and module.enabled
    if loaded:
        reason = "compiled module loaded" if live else "quant.backend=reference"
    else:
        reason = "compiled module did not load" if module.load_error else _NOT_IMPORTED
    return {
        "backend": "native" if live else "reference",
        "reason": reason,
        "load_error": module.load_error,
        "ops": sorted(module.NAMES) if live else [],
        "grids": list(module.GRIDS) if live else [],
        **module.describe_details(),
    }
