"""Which implementation runs: the configuration value `quant.backend`, and a report of what is live.

Each device with kernels of its own has a module here (`_cpu`, `_npu`) with `register`, `enabled`,
`report`, `list_compiled` and `unavailable_reason`; every other device runs the reference.
"""

from __future__ import annotations

from typing import Any

from megatron_bitcpm.errors import BackendError
from megatron_bitcpm.ops import _cpu, _npu
from megatron_bitcpm.quant.grids import TERNARY

_requested = "auto"


def use_backend(
    name: str, device_type: str = "cpu", grid: str = TERNARY, activation: str = "none"
) -> None:
    """Choose the implementation, the configuration value `quant.backend`.

    Args:
        name: "auto" (a device's compiled kernels where there are any), "reference" (pure torch
            everywhere), "native" (compiled kernels, an error where there are none).
        device_type: where the weights are: "cpu", "cuda", "npu"; "native" must hold there.
        grid: `quant.grid`; "native" must hold for it, too.
        activation: `quant.activation`, likewise.
    Raises:
        BackendError: compiled kernels were asked for and did not load, or there are none for this
            device, grid or activation, or the name is unknown.
    """
    global _requested
    if name not in ("auto", "reference", "native"):
        raise BackendError(f"quant.backend={name}: is no backend. Use auto, reference or native.")
    if name == "native":
        _require_native(device_type, grid, activation)
    _requested = name
    _cpu.enabled = _npu.enabled = name != "reference"


def _require_native(device_type: str, grid: str, activation: str) -> None:
    if device_type == "cpu":
        problem, fix = _cpu.unavailable_reason(), "Reinstall with a C++ compiler, or use auto"
    elif device_type == "npu":
        problem, fix = _npu.unavailable_reason(), "See docs/ascend.md, or use auto"
    else:
        problem, fix = f"there are no compiled operators for {device_type}", "Use auto"
    if problem is None:
        report = _npu.list_compiled() if device_type == "npu" else _cpu.list_compiled()
        missing = _find_uncompiled(report, grid, activation)
        if missing:
            problem, fix = f"no compiled operators for {missing[0]} on {device_type}", "Use auto"
    if problem:
        raise BackendError(f"quant.backend=native: {problem}. {fix}.")


def _find_uncompiled(compiled: dict[str, list[str]], grid: str, activation: str) -> list[str]:
    """Return the configuration values that the compiled ops and grids do not serve."""
    missing = [] if grid in compiled["grids"] else [f"quant.grid {grid}"]
    if activation != "none" and activation not in compiled["ops"]:
        missing.append(f"quant.activation {activation}")
    return missing


def describe_backend(device_type: str, grid: str = TERNARY, activation: str = "none") -> str:
    """Say in a few words what runs for weights of a grid on a device, and why.

    Args:
        device_type: where the weights are.
        grid: `quant.grid`.
        activation: `quant.activation`, which may run another implementation than the weights.
    """
    report = backend_report()
    found = report.get(device_type, report["other"])
    backend, reason = found["backend"], found["reason"]
    if backend == "reference":
        return f"reference on {device_type} ({reason})"
    missing = _find_uncompiled(found, grid, activation)
    if not missing:
        return f"{backend} on {device_type} ({reason})"
    why = f"no compiled operators for {' and '.join(missing)}"
    if grid in found["grids"]:
        return f"{backend} for weights, reference for activations on {device_type} ({why})"
    return f"reference on {device_type} ({why})"


def backend_report() -> dict[str, Any]:
    """Say which implementation each device has, and why; JSON-able.

    Returns:
        requested: argument of the last `use_backend`.  cpu: backend ("native" or "reference"), isa
        in use, isas to choose from, reason, load_error, and the compiled ops and grids.  npu: the
        same with device instead of isa and isas.  other: backend and reason elsewhere.
    """
    return {
        "requested": _requested,
        "cpu": _cpu.report(),
        "npu": _npu.report(),
        "other": {"backend": "reference", "reason": "no compiled kernels for other devices"},
    }
