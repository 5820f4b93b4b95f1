"""Times the CPU operators against memory: copies that move the same bytes and compute nothing.

A ratio is the median of the rounds' ratios. torch's own ways to compute the formula, eager and
compiled, run apart, because they take a hundred times as long and leave other memory behind. Their
sums have another order, so the scales and elements that differ from the operator's are counted.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.bench.ops_cases import (
    Candidate,
    compute_scales_in_torch,
    list_candidates,
    list_formulas,
    time_isas,
    time_threads,
)
from megatron_bitcpm.bench.timing import ratios, time_interleaved
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.settings import DEFAULT_EPS

DTYPES = ("float32", "bfloat16", "float16")
# Largest ratio to the memory floor, for this case only.
LIMITS_CASE = ([4096, 4096], "bfloat16")
LIMITS = {
    "fake_quantize/clone": 1.15,
    "fake_quantize_/mul_": 1.15,
    "pack2/clone_of_half": 1.2,
}
# Smallest gain of a kernel from a second thread, on a tensor that stays in the second-level cache.
# The gain of the public call is printed too: there 4 us of torch's dispatcher and of checks in
# Python, which do not scale, are a tenth to a third. float16 has the most work per byte.
THREADS_LIMIT = 1.7
THREADS_DTYPE = "float16"
# Part of one core's second-level cache that this tensor takes. One that fills it leaves it in part
# with one thread and not with two, so that the gain would be that of a second cache.
L2_SHARE = 0.75
RATIOS = ("foreach_fake_quantize_/mul_",)
TORCH_RATIOS = ("eager/fake_quantize", "compiled/fake_quantize", "reference/fake_quantize")
# The reference is two orders of magnitude slower; a few rounds of it are enough.
REFERENCE_ROUNDS = 3


def bench_ops(
    out_features: int, in_features: int, dtype: str, group_size: int, rounds: int
) -> dict[str, Any]:
    """Time the operators on one normal weight, and count where torch's formula differs.

    In the JSON a limit's `met` is None where it is for another shape or dtype; `threads` has, by
    dtype, the gains of the operator and of the kernel alone; `differing_elements` are those of
    torch's results, `differing_scales` those of torch's float32 mean.
    """
    if dtype not in DTYPES:
        raise BitcpmError(f"dtype={dtype}: is not supported. Use bfloat16, float16 or float32.")
    if rounds < 1:
        raise BitcpmError(f"rounds={rounds}: must be at least 1. Use 31.")
    shape = [out_features, in_features]
    w = _make_weight(out_features, in_features, dtype)
    ops.fake_quantize(w, group_size)  # refuses bad arguments before anything is measured
    formulas, unavailable = list_formulas(w, group_size)
    times_s, ratio = _time_on_weight(w, group_size, formulas, rounds)
    threads = _measure_threads(group_size, rounds)
    gain = threads[THREADS_DTYPE]["kernel_gain"]
    case = {"shape": shape, "dtype": dtype, "group_size": group_size, "eps": DEFAULT_EPS}
    return {
        "machine": _describe_machine(),
        "case": case | {"rounds": rounds},
        "limits": _check_limits(ratio, gain, (shape, dtype) == LIMITS_CASE),
        "median_ms": {**_find_medians(times_s), **dict.fromkeys(unavailable)},
        "min_ms": {name: round(min(values) * 1e3, 3) for name, values in times_s.items()},
        "ratio": ratio,
        "isa_median_ms": {
            isa: _find_medians(values) for isa, values in time_isas(w, group_size, rounds).items()
        },
        "threads": threads,
        **_count_differences(w, group_size, formulas),
        "unavailable": unavailable,
    }


def _time_on_weight(
    w: torch.Tensor, group_size: int, formulas: Mapping[str, Candidate], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time the operators beside their floors, then torch's formulas; return their ratios too."""
    times_s = time_interleaved(list_candidates(w, group_size), rounds)
    slow = {"reference": formulas["reference"]}
    fast = {name: formula for name, formula in formulas.items() if name not in slow}
    torch_times_s = time_interleaved(fast, rounds)
    torch_times_s |= time_interleaved(slow, min(rounds, REFERENCE_ROUNDS))
    ratio = _find_ratios(times_s, (*LIMITS, *RATIOS)) | _find_ratios(torch_times_s, TORCH_RATIOS)
    # The operator is in both: beside its floor counts.
    return times_s | torch_times_s | times_s, ratio


def _describe_machine() -> dict[str, Any]:
    name = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    report = ops.backend_report()["cpu"]
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        # Of others it makes every time here doubtful, most of all those on two threads.
        "load_average": round(os.getloadavg()[0], 2),
        "l2_bytes": _find_l2_bytes(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": report["backend"],
        "isa": report["isa"],
    }


def _find_l2_bytes() -> int:
    """Second-level cache of one core; 1 MiB where the system does not tell."""
    size = re.match(r"(\d+)K", _read("/sys/devices/system/cpu/cpu0/cache/index2/size"))
    return int(size[1]) << 10 if size else 1 << 20


def _read(path: str) -> str:
    """Text of a file of the system, '' where it has none."""
    return Path(path).read_text() if Path(path).exists() else ""


def _make_weight(out_features: int, in_features: int, dtype: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(out_features, in_features, generator=generator).mul_(0.02)
    return w.to(getattr(torch, dtype))


def _measure_threads(group_size: int, rounds: int) -> dict[str, Any]:
    """Time one and two threads on rows that stay in one core's second-level cache."""
    row_len = 1024 if group_size == -1 else group_size * max(1, 1024 // group_size)
    num_bytes = int(_find_l2_bytes() * L2_SHARE)
    found = {}
    for dtype in DTYPES:
        rows = max(1, num_bytes // (row_len * getattr(torch, dtype).itemsize))
        w = _make_weight(rows, row_len, dtype)
        times_s = time_threads(w, group_size, rounds)
        gains = _find_ratios(times_s, ("1/2", "kernel 1/kernel 2"))
        found[dtype] = {
            "shape": list(w.shape),
            "median_ms": _find_medians(times_s, 5),
            "gain": gains["1/2"],
            "kernel_gain": gains.get("kernel 1/kernel 2"),
        }
    return found


def _find_ratios(times_s: Mapping[str, Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Medians of the rounds' ratios, by numerator/denominator; of those that were timed."""
    pairs = {name: name.split("/") for name in names}
    return {
        name: round(statistics.median(ratios(times_s[above], times_s[below])), 3)
        for name, (above, below) in pairs.items()
        if above in times_s
    }


def _check_limits(
    ratio: Mapping[str, float], gain: float | None, is_limits_case: bool
) -> dict[str, dict[str, Any]]:
    """Compare with the limits; those to the memory floor are met or not in their own case only."""
    found: dict[str, dict[str, Any]] = {}
    for name, limit in LIMITS.items():
        met = ratio[name] <= limit if is_limits_case else None
        found[name] = {"ratio": ratio[name], "limit": limit, "met": met}
    met = None if gain is None else gain >= THREADS_LIMIT
    found["kernel threads 1->2"] = {"ratio": gain, "limit": THREADS_LIMIT, "met": met}
    return found


def _count_differences(
    w: torch.Tensor, group_size: int, formulas: Mapping[str, Candidate]
) -> dict[str, Any]:
    want = formulas["fake_quantize"]()
    scales = ops.quantize(w, group_size)[1]
    torch_scales = compute_scales_in_torch(w, group_size)[1]
    return {
        "elements": w.numel(),
        "differing_elements": {
            name: int((formulas[name]() != want).sum()) if name in formulas else None
            for name in ("eager", "compiled", "reference")
        },
        "scales": scales.numel(),
        "differing_scales": int((scales.flatten() != torch_scales.flatten()).sum()),
    }


def _find_medians(times_s: Mapping[str, Sequence[float]], digits: int = 3) -> dict[str, float]:
    """Medians in milliseconds."""
    return {name: round(statistics.median(t) * 1e3, digits) for name, t in times_s.items()}
