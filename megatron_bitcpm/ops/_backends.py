"""Which implementation runs: the configuration value `quant.backend`, and a report of what is live.

Each device with kernels of its own has a module here (`_cpu`, `_npu`) with `register`, `enabled`,
`report` and `unavailable_reason`; every other device runs the reference.
"""

from __future__ import annotations

from typing import Any

from megatron_bitcpm.errors import BackendError
from megatron_bitcpm.ops import _cpu, _npu

_requested = "auto"


def use_backend(name: str, device_type: str = "cpu") -> None:
    """Choose the implementation, the configuration value `quant.backend`.

    Args:
        name: "auto" (a device's compiled kernels where there are any), "reference" (pure torch
            everywhere), "native" (compiled kernels, an error where there are none).
        device_type: where the weights are: "cpu", "cuda", "npu"; "native" must hold there.
    Raises:
        BackendError: compiled kernels were asked for and did not load, or there are none for this
            device, or the name is unknown.
    """
    global _requested
    if name not in ("auto", "reference", "native"):
        raise BackendError.of(
            "quant.backend", name, "is no backend", "Use auto, reference or native"
        )
    if name == "native":
        _require_native(device_type)
    _requested = name
    _cpu.enabled = _npu.enabled = name != "reference"


def _require_native(device_type: str) -> None:
    if device_type == "cpu":
        problem, fix = _cpu.unavailable_reason(), "Reinstall with a C++ compiler, or use auto"
    elif device_type == "npu":
        problem, fix = _npu.unavailable_reason(), "Build them as docs/ascend.md says, or use auto"
    else:
        problem, fix = f"there are no compiled operators for {device_type}", "Use auto"
    if problem:
        raise BackendError.of("quant.backend", "native", problem, fix)


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
