"""Times the CPU operators against `Tensor.clone`, which moves the same bytes and computes nothing.

Every candidate runs once per round, so that a noisy machine slows all of them alike, and medians
are compared. Next to them run torch's own ways to compute the formula, eager and compiled; their
sums have another order, so the scales and elements that differ from the operator's are counted.
What does not live here: output and file names, see `bitcpm bench`.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.ops import _cpu
from megatron_bitcpm.quant import ternary

# The reference is two orders of magnitude slower; a few rounds of it are enough.
REFERENCE_ROUNDS = 3


def quantize_with_formula(w: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """Return wq of w [O, I] as one would write it in torch: float32, torch's own mean."""
    groups, scales = _compute_scales_in_torch(w, group_size, eps)
    wq = torch.where(2 * groups.abs() > scales, groups.sign() * scales, 0.0)
    return wq.to(w.dtype).reshape(w.shape)


def _compute_scales_in_torch(
    w: torch.Tensor, group_size: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = w.float().reshape(w.shape[0], -1, w.shape[1] if group_size == -1 else group_size)
    return groups, groups.abs().mean(dim=-1, keepdim=True).clamp(min=eps)


def bench_ops(
    out_features: int = 4096,
    in_features: int = 4096,
    dtype: str = "bfloat16",
    group_size: int = -1,
    rounds: int = 31,
    eps: float = ternary.DEFAULT_EPS,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the operators on one weight and count where torch's formula differs.

    Args:
        out_features: O of the weight.
        in_features: I of the weight.
        dtype: bfloat16, float16 or float32.
        group_size: inputs per scale, -1 for the row.
        rounds: timings per candidate, interleaved; at least 1.
        eps: smallest scale.
        seed: of the normal weights (standard deviation 0.02).
    Returns:
        JSON-able: `machine`, `case`, `median_ms` and `min_ms` by candidate (None where it could not
        run, with the reason in `unavailable`), `ratio` of medians, `elements` and `scales` of the
        weight, `differing_elements` from the operator's result by candidate, and
        `differing_scales`, those of torch's float32 mean.
    Raises:
        BitcpmError: dtype or rounds out of range, or arguments the operators refuse.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise BitcpmError.of("dtype", dtype, "is not supported", "Use bfloat16, float16 or float32")
    if rounds < 1:
        raise BitcpmError.of("rounds", rounds, "must be at least 1", "Use 31")
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out_features, in_features, generator=generator).mul_(0.02)
    w = w.to(getattr(torch, dtype))
    want = ops.fake_quantize(w, group_size, eps)
    scales = ops.quantize(w, group_size, eps)[1]
    torch_scales = _compute_scales_in_torch(w, group_size, eps)[1]
    compiled, unavailable = _compile_formula(w, group_size, eps)
    candidates = _list_candidates(w, group_size, eps, compiled)
    times_ms = _time_interleaved(candidates, rounds)
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    results = {"eager": quantize_with_formula(w, group_size, eps), "compiled": None}
    if compiled is not None:
        results["compiled"] = compiled(w, group_size, eps)
    results["reference"] = ternary.fake_quantize(w, group_size, eps)
    return {
        "machine": describe_machine(),
        "case": {
            "shape": [out_features, in_features],
            "dtype": dtype,
            "group_size": group_size,
            "eps": eps,
            "rounds": rounds,
        },
        "median_ms": {**_rounded(medians), **dict.fromkeys(unavailable)},
        "min_ms": _rounded({name: min(values) for name, values in times_ms.items()}),
        "ratio": _list_ratios(medians),
        "elements": w.numel(),
        "differing_elements": {
            name: None if wq is None else int((wq != want).sum()) for name, wq in results.items()
        },
        "scales": scales.numel(),
        "differing_scales": int((scales.flatten() != torch_scales.flatten()).sum()),
        "unavailable": unavailable,
    }


def describe_machine() -> dict[str, Any]:
    """Return processor, threads, torch version and operator backend, JSON-able."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    report = ops.backend_report()["cpu"]
    return {
        "cpu": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": report["backend"],
        "isa": report["isa"],
        "huge_page_hint": report["backend"] == "native" and _cpu.huge_page_min_bytes is not None,
    }


def _compile_formula(
    w: torch.Tensor, group_size: int, eps: float
) -> tuple[Callable[..., torch.Tensor] | None, dict[str, str]]:
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return None, {"compiled": "TORCHDYNAMO_DISABLE is set"}
    try:
        compiled = torch.compile(quantize_with_formula)
        compiled(w, group_size, eps)
    except Exception as error:  # whatever the tool chain raises: it is reported, not needed
        reason = str(error).strip().splitlines()
        return None, {"compiled": f"{type(error).__name__}: {reason[0] if reason else ''}"}
    return compiled, {}


def _list_candidates(
    w: torch.Tensor,
    group_size: int,
    eps: float,
    compiled: Callable[..., torch.Tensor] | None,
) -> dict[str, Callable[[], Any]]:
    # In-place forms work on copies of their own; time does not depend on the values.
    quantized, scaled = w.clone(), w.clone()

    def without_huge_pages() -> torch.Tensor:
        before, _cpu.huge_page_min_bytes = _cpu.huge_page_min_bytes, None
        try:
            return ops.fake_quantize(w, group_size, eps)
        finally:
            _cpu.huge_page_min_bytes = before

    candidates: dict[str, Callable[[], Any]] = {
        "clone": w.clone,
        "fake_quantize": lambda: ops.fake_quantize(w, group_size, eps),
        "fake_quantize_small_pages": without_huge_pages,
        "quantize": lambda: ops.quantize(w, group_size, eps),
        "mul_": lambda: scaled.mul_(1.0),
        "fake_quantize_": lambda: ops.fake_quantize_(quantized, group_size, eps),
        "eager": lambda: quantize_with_formula(w, group_size, eps),
        "reference": lambda: ternary.fake_quantize(w, group_size, eps),
    }
    if compiled is not None:
        candidates["compiled"] = lambda: compiled(w, group_size, eps)
    return candidates


def _time_interleaved(
    candidates: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
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


def _list_ratios(medians: dict[str, float]) -> dict[str, float]:
    """Ratios of medians, named numerator/denominator."""
    pairs = [
        ("fake_quantize", "clone"),
        ("fake_quantize_small_pages", "clone"),
        ("fake_quantize_", "mul_"),
        ("eager", "fake_quantize"),
        ("compiled", "fake_quantize"),
        ("reference", "fake_quantize"),
    ]
    ratios = {f"{a}/{b}": medians[a] / medians[b] for a, b in pairs if a in medians}
    return _rounded(ratios)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}
