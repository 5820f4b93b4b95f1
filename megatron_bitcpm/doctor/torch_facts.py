"""What torch says about itself, asked in a process of its own.

Importing torch can fail or kill the process: an accelerator's library may be loaded with it. So
this module runs as a program that prints a fact as soon as it knows it, and `ask_torch` reads them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

_MARK = "torch-fact "
TIMEOUT_S = 120

Facts = dict[str, Any]
"""Fact name -> value, or a text that begins with `FAILED`; absent where torch did not get there."""

FAILED = "failed: "


def failure(facts: Facts, name: str) -> str | None:
    """Return why a fact could not be found out, one line, or None."""
    value = facts.get(name)
    if isinstance(value, str) and value.startswith(FAILED):
        return value.removeprefix(FAILED)
    return None


def reason_of(live: Mapping[str, Any]) -> str:
    """Return why an entry of `ops.backend_report` is what it is, with what the loader said."""
    error = live.get("load_error")
    return f"{live['reason']} ({error})" if error else str(live["reason"])


def ask_torch(environ: Mapping[str, str], import_only: bool = False) -> Facts:
    """Collect the facts in a new process with that environment; ``torch`` is always there."""
    command = [sys.executable, "-c", f"from {__name__} import main; main({import_only})"]
    # Of several ranks each would wait for the others.
    alone = {k: v for k, v in environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        done = subprocess.run(
            command, env=alone, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        output, code, errors = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode(errors="replace"), 0
        errors = f"no answer within {TIMEOUT_S} s"
    facts: Facts = {}
    for line in output.splitlines():
        if line.startswith(_MARK):
            facts.update(json.loads(line.removeprefix(_MARK)))
    if "torch" not in facts:
        last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
        facts["torch"] = f"{FAILED}the process died (exit code {code}): {last}"
    return facts


def main(import_only: bool) -> None:
    """Print the facts, one a line; see `ask_torch`."""
    steps: dict[str, Callable[[], Any]] = {
        "torch": _torch,
        "npu": _npu,
        "cuda": _cuda,
        "collectives": _collectives,
        "gloo": _gloo,
        "platform": _platform,
        "operators": _operators,
    }
    for name, step in steps.items():
        try:
            value = step()
        except Exception as error:
            traceback.print_exc()
            value = FAILED + _describe(error)
        print(_MARK + json.dumps({name: value}), flush=True)
        if import_only or "torch" not in sys.modules:
            return


def _describe(error: BaseException) -> str:
    """Return the kind and the first line of an error and of what caused it."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    cause = f" ({_describe(error.__cause__)})" if error.__cause__ else ""
    return f"{type(error).__name__}: {first_line}{cause}"


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "file": str(torch.__file__),
        "threads": torch.get_num_threads(),
    }


def _npu() -> dict[str, Any] | None:
    if importlib.util.find_spec("torch_npu") is None:
        return None
    import torch
    import torch_npu

    npu: Any = torch.npu  # type: ignore[attr-defined]
    return {
        "version": str(torch_npu.__version__),
        "is_available": bool(npu.is_available()),
        "device_count": int(npu.device_count()),
    }


def _cuda() -> dict[str, int]:
    import torch

    return {"device_count": torch.cuda.device_count()}


def _collectives() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    found = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        # torch_npu adds its own to the list.
        "hccl": "hccl" in dist.Backend.backend_list,
    }
    return [name for name, there in found.items() if there]


def _gloo() -> bool:
    """Start gloo on this machine; it fails, for example, where the host has no address."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    value = torch.ones(1)
    dist.all_reduce(value)
    dist.destroy_process_group()
    return bool(value == 1)


def _platform() -> str:
    from megatron_bitcpm.platforms import current_platform

    return current_platform().name


def _operators() -> dict[str, Any]:
    from megatron_bitcpm import ops

    return ops.backend_report()
