"""Times the CPU operators against memory: copies that move the same bytes and compute nothing.

Every candidate runs once per round, so that a noisy machine slows all of them alike, and a ratio is
the median of the rounds' ratios. Then run torch's own ways to compute the formula, eager and
compiled, apart, because they take a hundred times as long and leave other memory behind. Their sums
have another order, so the scales and elements that differ from the operator's are counted.

What does not live here: the candidates (`megatron_bitcpm.evaluation.bench_ops_cases`), output and
file names (`bitcpm bench`).
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.evaluation.bench_ops_cases import (
    compile_formula,
    compute_scales_in_torch,
    list_candidates,
    list_formulas,
    quantize_with_formula,
    time_interleaved,
    time_isas,
    time_threads,
)
from megatron_bitcpm.quant import fake_quant
from megatron_bitcpm.quant.scales import DEFAULT_EPS

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
TORCH_RATIOS = (
    "eager/fake_quantize",
    "compiled/fake_quantize",
    "reference/fake_quantize",
)
# Of one core, where the system does not tell.
DEFAULT_L2_BYTES = 1 << 20


def bench_ops(
    out_features: int = 4096,
    in_features: int = 4096,
    dtype: str = "bfloat16",
    group_size: int = -1,
    rounds: int = 31,
    eps: float = DEFAULT_EPS,
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
        JSON-able: `machine`, `case`; `limits`, each with `ratio`, `limit` and `met` (None where the
        limit is for another shape or dtype than this one); `median_ms` and `min_ms` by candidate
        (None where it could not run, with the reason in `unavailable`);
        `ratio`, medians of the rounds' ratios; `isa_median_ms` by instruction set and operator;
        `threads`, by dtype, milliseconds per call on one and two threads and the gain, of the
        operator and of the kernel alone; `elements` and `scales` of the weight,
        `differing_elements` from the operator's result by candidate, and `differing_scales`,
        those of torch's float32 mean.
    Raises:
        BitcpmError: dtype or rounds out of range, or arguments the operators refuse.
    """
    if dtype not in ("bfloat16", "float16", "float32"):
        raise BitcpmError(f"dtype={dtype}: is not supported. Use bfloat16, float16 or float32.")
    if rounds < 1:
        raise BitcpmError(f"rounds={rounds}: must be at least 1. Use 31.")
    w = _make_weight(out_features, in_features, dtype, seed)
    ops.fake_quantize(w, group_size, eps)  # refuses bad arguments before anything is measured
    compiled, unavailable = compile_formula(w, group_size, eps)
    times_ms = time_interleaved(list_candidates(w, group_size, eps), rounds)
    ratios = _list_ratios(times_ms, (*LIMITS, *RATIOS))
    torch_times_ms = time_interleaved(list_formulas(w, group_size, eps, compiled), rounds)
    ratios |= _list_ratios(torch_times_ms, TORCH_RATIOS)
    times_ms |= {name: ms for name, ms in torch_times_ms.items() if name not in times_ms}
    threads = _measure_threads(group_size, eps, rounds, seed)
    return {
        "machine": describe_machine(),
        "case": {
            "shape": [out_features, in_features],
            "dtype": dtype,
            "group_size": group_size,
            "eps": eps,
            "rounds": rounds,
        },
        "limits": _check_limits(
            ratios,
            threads[THREADS_DTYPE]["kernel_gain"],
            ([out_features, in_features], dtype) == LIMITS_CASE,
        ),
        "median_ms": {**_find_medians(times_ms), **dict.fromkeys(unavailable)},
        "min_ms": {name: round(min(values), 3) for name, values in times_ms.items()},
        "ratio": ratios,
        "isa_median_ms": {
            isa: _find_medians(values)
            for isa, values in time_isas(w, group_size, eps, rounds).items()
        },
        "threads": threads,
        **_count_differences(w, group_size, eps, compiled),
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
    """Second-level cache of one core."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    try:
        return int(size.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return DEFAULT_L2_BYTES


def _make_weight(out_features: int, in_features: int, dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out_features, in_features, generator=generator).mul_(0.02)
    return w.to(getattr(torch, dtype))


def _measure_threads(group_size: int, eps: float, rounds: int, seed: int) -> dict[str, Any]:
    """Time one and two threads on rows that stay in one core's second-level cache."""
    row_len = 1024 if group_size == -1 else group_size * max(1, 1024 // group_size)
    num_bytes = int(_find_l2_bytes() * L2_SHARE)
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        rows = max(1, num_bytes // (row_len * getattr(torch, dtype).itemsize))
        w = _make_weight(rows, row_len, dtype, seed)
        times_ms = time_threads(w, group_size, eps, rounds)
        found[dtype] = {
            "shape": list(w.shape),
            "median_ms": {n: round(statistics.median(values), 5) for n, values in times_ms.items()},
            "gain": _find_gain(times_ms, "1", "2"),
            "kernel_gain": _find_gain(times_ms, "kernel 1", "kernel 2"),
        }
    return found


def _find_gain(times_ms: Mapping[str, Sequence[float]], one: str, two: str) -> float | None:
    """Median of the rounds' ratios, None where these were not timed."""
    if one not in times_ms:
        return None
    pairs = zip(times_ms[one], times_ms[two], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def _list_ratios(times_ms: Mapping[str, Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Medians of the rounds' ratios, by numerator/denominator."""
    ratios = {}
    for name in names:
        above, below = name.split("/")
        if above in times_ms:
            # The reference has fewer rounds: the first ones.
            pairs = zip(times_ms[above], times_ms[below], strict=False)
            ratios[name] = round(statistics.median(a / b for a, b in pairs), 3)
    return ratios


def _check_limits(
    ratios: Mapping[str, float], gain: float | None, is_limits_case: bool
) -> dict[str, dict[str, Any]]:
    """Compare with the limits; those to the memory floor are met or not in their own case only."""
    checked: dict[str, dict[str, Any]] = {
        name: {
            "ratio": ratios[name],
            "limit": limit,
            "met": ratios[name] <= limit if is_limits_case else None,
        }
        for name, limit in LIMITS.items()
    }
    checked["kernel threads 1->2"] = {
        "ratio": gain,
        "limit": THREADS_LIMIT,
        "met": None if gain is None else gain >= THREADS_LIMIT,
    }
    return checked


def _count_differences(
    w: torch.Tensor, group_size: int, eps: float, compiled: Any
) -> dict[str, Any]:
    want = ops.fake_quantize(w, group_size, eps)
    scales = ops.quantize(w, group_size, eps)[1]
    torch_scales = compute_scales_in_torch(w, group_size, eps)[1]
    results = {
        "eager": quantize_with_formula(w, group_size, eps),
        "compiled": None if compiled is None else compiled(w, group_size, eps),
        "reference": fake_quant.fake_quantize(w, group_size, eps),
    }
    return {
        "elements": w.numel(),
        "differing_elements": {
            name: None if wq is None else int((wq != want).sum()) for name, wq in results.items()
        },
        "scales": scales.numel(),
        "differing_scales": int((scales.flatten() != torch_scales.flatten()).sum()),
    }


def _find_medians(times_ms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 3) for name, values in times_ms.items()}
