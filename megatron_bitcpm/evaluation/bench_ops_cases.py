"""What `bench_ops` times: the operators, memory floors, and torch's own ways to the same formula.

A floor moves the bytes that an operator must move and computes (almost) nothing: `clone` for a new
tensor, `mul_` in place, a `clone` of half of input plus output for the packed forms. What does not
live here: ratios, limits and the report, see `megatron_bitcpm.evaluation.bench_ops`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.ops import _cpu
from megatron_bitcpm.quant import fake_quant
from megatron_bitcpm.quant.grids import GRIDS, TERNARY

Candidate = Callable[[], Any]
# The reference is two orders of magnitude slower; a few rounds of it are enough.
REFERENCE_ROUNDS = 3
# Tensors that the list operators get: slices of the weight's rows.
LIST_LEN = 8


def quantize_with_formula(w: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """Return wq of w [O, I] as one would write it in torch: float32, torch's own mean."""
    groups, scales = compute_scales_in_torch(w, group_size, eps)
    wq = torch.where(2 * groups.abs() > scales, groups.sign() * scales, 0.0)
    return wq.to(w.dtype).reshape(w.shape)


def compute_scales_in_torch(
    w: torch.Tensor, group_size: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 groups of w, [O, G, inputs], and their mean magnitudes, [O, G, 1]."""
    groups = w.float().reshape(w.shape[0], -1, w.shape[1] if group_size == -1 else group_size)
    return groups, groups.abs().mean(dim=-1, keepdim=True).clamp(min=eps)


def compile_formula(
    w: torch.Tensor, group_size: int, eps: float
) -> tuple[Callable[..., torch.Tensor] | None, dict[str, str]]:
    """Return `quantize_with_formula` compiled for w, or None and the reason under "compiled"."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return None, {"compiled": "TORCHDYNAMO_DISABLE is set"}
    try:
        compiled = torch.compile(quantize_with_formula)
        compiled(w, group_size, eps)
    except Exception as error:  # whatever the tool chain raises: it is reported, not needed
        reason = str(error).strip().splitlines()
        return None, {"compiled": f"{type(error).__name__}: {reason[0] if reason else ''}"}
    return compiled, {}


def list_candidates(w: torch.Tensor, group_size: int, eps: float) -> dict[str, Candidate]:
    """Return what is timed on w [O, I], by name; a floor comes right before what it bounds."""
    codes, scales = ops.quantize(w, group_size, eps)
    packed = ops.pack2(codes)
    half = torch.ones((codes.nbytes + packed.nbytes) // 2, dtype=torch.uint8)
    # In-place forms work on copies of their own; time does not depend on the values.
    scaled, quantized, quantized_with_scales, listed = (w.clone() for _ in range(4))
    slice_len = -(-w.shape[0] // LIST_LEN)
    ws, scales_of_ws = list(listed.split(slice_len)), list(scales.split(slice_len))

    candidates: dict[str, Candidate] = {
        "clone": w.clone,
        "fake_quantize": lambda: ops.fake_quantize(w, group_size, eps),
        "mul_": lambda: scaled.mul_(1.0),
        "fake_quantize_": lambda: ops.fake_quantize_(quantized, group_size, eps),
        "foreach_fake_quantize_": lambda: ops.foreach_fake_quantize_(ws, group_size, eps),
        "clone_of_half": half.clone,
        "pack2": lambda: ops.pack2(codes),
        "unpack2": lambda: ops.unpack2(packed, w.shape[1]),
        "quantize": lambda: ops.quantize(w, group_size, eps),
        "abs_sums": lambda: ops.abs_sums(w, group_size),
        "fake_quantize_with_scales": lambda: ops.fake_quantize_with_scales(w, scales),
        "fake_quantize_with_scales_": lambda: ops.fake_quantize_with_scales_(
            quantized_with_scales, scales
        ),
        "foreach_fake_quantize_with_scales_": lambda: ops.foreach_fake_quantize_with_scales_(
            ws, scales_of_ws
        ),
        "int8_per_token": lambda: ops.int8_per_token(w),
    }
    for name in GRIDS:
        if name != TERNARY:
            candidates[f"fake_quantize {name}"] = _bind_grid(w, group_size, eps, name)
    return candidates


def list_formulas(
    w: torch.Tensor,
    group_size: int,
    eps: float,
    compiled: Callable[..., torch.Tensor] | None,
) -> dict[str, Candidate]:
    """Return the operator and torch's own ways to the same formula, by name."""
    candidates: dict[str, Candidate] = {
        "fake_quantize": lambda: ops.fake_quantize(w, group_size, eps),
        "eager": lambda: quantize_with_formula(w, group_size, eps),
    }
    if compiled is not None:
        candidates["compiled"] = lambda: compiled(w, group_size, eps)
    candidates["reference"] = lambda: fake_quant.fake_quantize(w, group_size, eps)
    return candidates


def _bind_grid(w: torch.Tensor, group_size: int, eps: float, grid: str) -> Candidate:
    return lambda: ops.fake_quantize(w, group_size, eps, grid)


def time_interleaved(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, list[float]]:
    """Run every candidate once per round and return milliseconds by name, one per round."""
    times_ms: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(-1, rounds):  # round -1 warms up
        for name, candidate in candidates.items():
            if name == "reference" and index >= REFERENCE_ROUNDS:
                continue
            start = time.perf_counter()
            result = candidate()
            elapsed_ms = (time.perf_counter() - start) * 1e3
            del result  # freed outside the timing, before the next candidate allocates
            if index >= 0:
                times_ms[name].append(elapsed_ms)
    return times_ms


def time_isas(
    w: torch.Tensor, group_size: int, eps: float, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return milliseconds of some operators on w, by instruction set and operator."""
    if not (_cpu.enabled and _cpu.native):
        return {}
    names = ("fake_quantize_", "quantize", "pack2", "unpack2", "int8_per_token")
    active = _cpu.isa or "auto"
    candidates = {}
    for isa in _cpu.native.supported_isas():
        for name, candidate in list_candidates(w, group_size, eps).items():
            if name in names:
                candidates[f"{isa} {name}"] = _on_isa(isa, candidate)
    try:
        times_ms = time_interleaved(candidates, rounds)
    finally:
        _cpu.select_isa(active)
    found: dict[str, dict[str, list[float]]] = {}
    for key, values in times_ms.items():
        isa, name = key.split(" ")
        found.setdefault(isa, {})[name] = values
    return found


def _on_isa(isa: str, candidate: Candidate) -> Candidate:
    def run() -> Any:
        _cpu.select_isa(isa)
        return candidate()

    return run


def _bind_kernel(w: torch.Tensor, group_len: int, eps: float, threads: int) -> Candidate:
    fake_quantize, (dtype, ternary) = _cpu.native.fake_quantize, _cpu.find_codes(w.dtype, TERNARY)
    jobs = [(w.data_ptr(), w.data_ptr(), dtype, w.numel() // group_len, group_len)]
    return lambda: fake_quantize(jobs, ternary, eps, threads)


def time_threads(
    w: torch.Tensor, group_size: int, eps: float, rounds: int, calls: int = 40
) -> dict[str, list[float]]:
    """Return milliseconds per in-place call on a copy of w, on one thread ("1") and two ("2").

    "kernel 1" and "kernel 2" are those of the compiled function alone, without torch's dispatcher
    and the checks in Python, which take a constant time.

    Calls are repeated so that w stays in the caches and the second thread awake; the rounds of the
    two alternate.
    """
    before = torch.get_num_threads()
    w = w.clone()
    group_len = w.shape[1] if group_size == -1 else group_size
    candidates: dict[str, Candidate] = {
        name: lambda: ops.fake_quantize_(w, group_size, eps) for name in ("1", "2")
    }
    if _cpu.enabled and _cpu.native:
        for threads in (1, 2):
            candidates[f"kernel {threads}"] = _bind_kernel(w, group_len, eps, threads)
    times_ms: dict[str, list[float]] = {name: [] for name in candidates}
    try:
        for _ in range(rounds):
            for name, candidate in candidates.items():
                torch.set_num_threads(int(name[-1]))
                candidate()
                start = time.perf_counter()
                for _ in range(calls):
                    candidate()
                times_ms[name].append((time.perf_counter() - start) * 1e3 / calls)
    finally:
        torch.set_num_threads(before)
    return times_ms
