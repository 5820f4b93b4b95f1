"""Every implementation of the operators, one row each; `test_contract.py` runs over all of them.

A row has the operators of `megatron_bitcpm.ops` as methods over CPU tensors, whatever is behind
them: torch operators under a chosen backend, or a runner process built from `csrc`. What a backend
cannot do is declared in its row.

The slow tests build the runners. A backend whose toolchain is absent is skipped with the reason;
with BITCPM_REQUIRE_BACKENDS=1 that is an error, and with BITCPM_REQUIRE_BACKENDS=npu it is one that
there is no Ascend device.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kernel_runner import KernelRunner, RunnerOperators
from megatron_bitcpm import ops
from megatron_bitcpm.ops import _cpu
from megatron_bitcpm.quant.grids import GRIDS

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "checks"
OTHER_GRIDS = frozenset(grid for grid in GRIDS if grid != "ternary")


class TorchOperators:
    """`megatron_bitcpm.ops` on one device, results on the CPU."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def fake_quantize(
        self, w: torch.Tensor, *args: Any, inplace: int = 0, **keys: Any
    ) -> torch.Tensor:
        w = w.to(self.device, copy=True)
        return (ops.fake_quantize_ if inplace else ops.fake_quantize)(w, *args, **keys).cpu()

    def fake_quantize_with_scales(
        self, w: torch.Tensor, scales: torch.Tensor, grid: str = "ternary", inplace: int = 0
    ) -> torch.Tensor:
        run = ops.fake_quantize_with_scales_ if inplace else ops.fake_quantize_with_scales
        return run(w.to(self.device, copy=True), scales.to(self.device), grid).cpu()

    def quantize(self, w: torch.Tensor, *args: Any, **keys: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x.cpu() for x in ops.quantize(w.to(self.device), *args, **keys))

    def abs_sums(self, w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
        return ops.abs_sums(w.to(self.device), group_size).cpu()

    def pack2(self, codes: torch.Tensor) -> torch.Tensor:
        return ops.pack2(codes.to(self.device)).cpu()

    def unpack2(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        return ops.unpack2(packed.to(self.device), in_features).cpu()

    def int8_per_token(self, x: torch.Tensor) -> torch.Tensor:
        return ops.int8_per_token(x.to(self.device)).cpu()


@contextlib.contextmanager
def run_reference() -> Iterator[TorchOperators]:
    """The pure-torch reference."""
    ops.use_backend("reference")
    try:
        yield TorchOperators()
    finally:
        ops.use_backend("auto")


def run_isa(isa: str) -> Callable[[], contextlib.AbstractContextManager[TorchOperators]]:
    """The compiled module with one instruction set."""

    @contextlib.contextmanager
    def run() -> Iterator[TorchOperators]:
        ops.use_backend("native")
        _cpu.select_isa(isa)
        try:
            yield TorchOperators()
        finally:
            ops.use_backend("auto")
            _cpu.select_isa("auto")

    return run


@contextlib.contextmanager
def run_npu() -> Iterator[TorchOperators]:
    """The kernels on an Ascend device."""
    ops.use_backend("native", "npu")
    try:
        yield TorchOperators("npu")
    finally:
        ops.use_backend("auto")


_runners: dict[str, KernelRunner] = {}


def run_runner(
    name: str, *prefix: str, **keys: object
) -> Callable[[], contextlib.AbstractContextManager[RunnerOperators]]:
    """The executable `name` in build/checks, one process for all tests; see `close_runners`."""

    @contextlib.contextmanager
    def run() -> Iterator[RunnerOperators]:
        if name not in _runners:
            _runners[name] = KernelRunner([*prefix, str(BUILD / name)])
        yield RunnerOperators(_runners[name], **keys)

    return run


def close_runners() -> None:
    """End the runner processes; raises where a sanitizer has found a leak at the end."""
    while _runners:
        _runners.popitem()[1].close()


@dataclass(frozen=True)
class Backend:
    """One row.

    Attributes:
        name: shown in test names.
        run: context manager that gives the operators.
        make: arguments of `make` that build it, empty where the package's build has done it.
        tools: programs it needs.
        grids: what it knows of the grids.
        lacks: operators it does not have, or "refusal of codes": an accelerator's pack2 cannot
            refuse codes that are not ternary, its Python side looks first.
        marks: pytest marks of its tests.
    """

    name: str
    run: Callable[[], contextlib.AbstractContextManager[Any]]
    make: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    grids: frozenset[str] = frozenset(GRIDS)
    lacks: frozenset[str] = frozenset()
    marks: tuple[pytest.MarkDecorator, ...] = field(default=())

    def can(self, op: str, grid: str) -> bool:
        """Whether it declares to have an operator in a grid."""
        return op not in self.lacks and grid in self.grids

    def find_absence(self) -> str | None:
        """Return why it cannot run here, or None."""
        for tool in self.tools:
            if not shutil.which(tool):
                return f"{tool} is not installed"
        if self.name.startswith("cpu:") and not self.make and _cpu.native is None:
            return f"compiled module did not load ({_cpu.load_error})"
        if self.name == "npu":
            if not hasattr(torch, "npu"):
                return "no Ascend device that torch knows of (torch_npu is not imported)"
            if not torch.npu.is_available():
                return "no Ascend device"
        return None

    def build(self) -> None:
        """Bring its runner up to date; raises CalledProcessError with the compiler's messages."""
        if self.make:
            subprocess.run(["make", "-s", *self.make, f"BUILD={BUILD}"], cwd=ROOT, check=True)

    def is_built(self) -> bool:
        """Tell whether its runner is up to date."""
        if not self.make:
            return True
        command = ["make", "-q", *self.make, f"BUILD={BUILD}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def list_isas() -> list[str]:
    """Instruction sets of the compiled module; "native" stands for one that did not load."""
    return _cpu.native.supported_isas() if _cpu.native else ["native"]


SLOW = (pytest.mark.slow,)
CPU_CHECKS = ("-C", "csrc/cpu/checks")
ASCEND_CHECK = ("-C", "tests/ascend/host_check", "runner")
ASCEND_LACKS = frozenset({"unpack2", "int8_per_token", "refusal of codes"})
TERNARY_ONLY = frozenset({"ternary"})

BACKENDS = [
    Backend("reference", run_reference),
    *(Backend(f"cpu:{isa}", run_isa(isa)) for isa in list_isas()),
    Backend(
        "cpu:asan",
        run_runner("cpu-asan", threads=2),
        make=(*CPU_CHECKS, "asan"),
        tools=("make", "g++"),
        marks=SLOW,
    ),
    *(
        Backend(
            f"cpu:{isa}-qemu",
            run_runner(
                "cpu-neon", "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", isa=isa, threads=2
            ),
            make=(*CPU_CHECKS, "neon"),
            tools=("make", "aarch64-linux-gnu-g++", "qemu-aarch64"),
            marks=SLOW,
        )
        for isa in ("neon", "generic")
    ),
    *(
        Backend(
            f"ascend:nan-{nan}",
            run_runner("ascend-runner", blocks=3, seed=seed, nan=nan, sat=seed),
            make=ASCEND_CHECK,
            tools=("make", "g++"),
            grids=TERNARY_ONLY,
            lacks=ASCEND_LACKS,
            marks=SLOW,
        )
        for seed, nan in enumerate(("propagate", "drop"))
    ),
    Backend("npu", run_npu, marks=(pytest.mark.npu,)),
]
RUNNERS = [backend for backend in BACKENDS if backend.make]


def require(backend: Backend, reason: str | None) -> None:
    """Skip the test for `reason`; fail it where BITCPM_REQUIRE_BACKENDS asks for the backend."""
    if not reason:
        return
    required = os.environ.get("BITCPM_REQUIRE_BACKENDS")
    if required and required == ("npu" if backend.name == "npu" else "1"):
        pytest.fail(f"{backend.name}: {reason}, and BITCPM_REQUIRE_BACKENDS={required}")
    pytest.skip(f"{backend.name}: {reason}")
