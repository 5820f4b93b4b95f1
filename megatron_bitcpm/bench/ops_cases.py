"""What `bench.ops` times: the operators, memory floors, and torch's own ways to the same formula.

A floor moves the bytes that an operator must move and computes (almost) nothing: `clone` for a new
tensor, `mul_` in place, a `clone` of half of input plus output for the packed forms.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.bench.timing import interleave, time_s
from megatron_bitcpm.ops import _cpu
from megatron_bitcpm.quant import fake_quant
from megatron_bitcpm.quant.grids import GRIDS, TERNARY
from megatron_bitcpm.quant.groups import resolve_group_size
from megatron_bitcpm.quant.settings import DEFAULT_EPS

Candidate = Callable[[], Any]
# Tensors that the list operators get: slices of the weight's rows.
LIST_LEN = 8
# What is timed on every instruction set.
ISA_NAMES = ("fake_quantize_", "pack2", "unpack2", "quantize", "int8_per_token")


def quantize_with_formula(w: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return wq of w [O, I] as one would write it in torch: float32, torch's own mean."""
    groups, scales = compute_scales_in_torch(w, group_size)
    wq = torch.where(2 * groups.abs() > scales, groups.sign() * scales, 0.0)
    return wq.to(w.dtype).reshape(w.shape)


def compute_scales_in_torch(w: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 groups of w, [O, G, inputs], and their mean magnitudes, [O, G, 1]."""
    groups = w.float().reshape(w.shape[0], -1, w.shape[1] if group_size == -1 else group_size)
    return groups, groups.abs().mean(dim=-1, keepdim=True).clamp(min=DEFAULT_EPS)


def list_formulas(w: torch.Tensor, group_size: int) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Return the operator, its reference and torch's own ways; then why one is unavailable."""
    formulas: dict[str, Candidate] = {
        "fake_quantize": partial(ops.fake_quantize, w, group_size),
        "eager": partial(quantize_with_formula, w, group_size),
        "reference": partial(fake_quant.fake_quantize, w, group_size),
    }
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return formulas, {"compiled": "TORCHDYNAMO_DISABLE is set"}
    try:
        compiled = partial(torch.compile(quantize_with_formula), w, group_size)
        compiled()
    except Exception as error:  # whatever the tool chain raises: it is reported, not needed
        reason = str(error).strip().partition("\n")[0]
        return formulas, {"compiled": f"{type(error).__name__}: {reason}"}
    return formulas | {"compiled": compiled}, {}


def list_candidates(w: torch.Tensor, group_size: int) -> dict[str, Candidate]:
    """Return what is timed on w [O, I], by name; a floor comes right before what it bounds."""
    codes, scales = ops.quantize(w, group_size)
    packed = ops.pack2(codes)
    half = torch.ones((codes.nbytes + packed.nbytes) // 2, dtype=torch.uint8)
    # In-place forms work on copies of their own; time does not depend on the values.
    scaled, quantized, rescaled, listed = (w.clone() for _ in range(4))
    slice_len = -(-w.shape[0] // LIST_LEN)
    ws, scales_of_ws = list(listed.split(slice_len)), list(scales.split(slice_len))
    return {
        "clone": w.clone,
        "fake_quantize": partial(ops.fake_quantize, w, group_size),
        "mul_": partial(scaled.mul_, 1.0),
        "fake_quantize_": partial(ops.fake_quantize_, quantized, group_size),
        "foreach_fake_quantize_": partial(ops.foreach_fake_quantize_, ws, group_size),
        "clone_of_half": half.clone,
        "pack2": partial(ops.pack2, codes),
        "unpack2": partial(ops.unpack2, packed, w.shape[1]),
        "quantize": partial(ops.quantize, w, group_size),
        "abs_sums": partial(ops.abs_sums, w, group_size),
        "fake_quantize_with_scales": partial(ops.fake_quantize_with_scales, w, scales),
        "fake_quantize_with_scales_": partial(ops.fake_quantize_with_scales_, rescaled, scales),
        "foreach_fake_quantize_with_scales_": partial(
            ops.foreach_fake_quantize_with_scales_, ws, scales_of_ws
        ),
        "int8_per_token": partial(ops.int8_per_token, w),
        **{
            f"fake_quantize {grid}": partial(ops.fake_quantize, w, group_size, grid=grid)
            for grid in GRIDS
            if grid != TERNARY
        },
    }


def time_isas(w: torch.Tensor, group_size: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds of some operators on w, by instruction set and operator."""
    if not (_cpu.enabled and _cpu.native):
        return {}

    def time_on(isa: str, name: str) -> float:
        _cpu.select_isa(isa)
        return time_s(candidates[name])

    candidates, active = list_candidates(w, group_size), _cpu.isa or "auto"
    isas = _cpu.native.supported_isas()
    measures = {(i, name): partial(time_on, i, name) for i in isas for name in ISA_NAMES}
    try:
        times_s = interleave(measures, rounds)
    finally:
        _cpu.select_isa(active)
    return {isa: {name: times_s[isa, name] for name in ISA_NAMES} for isa in isas}


def time_threads(
    w: torch.Tensor, group_size: int, rounds: int, calls: int = 40
) -> dict[str, list[float]]:
    """Return seconds per in-place call on a copy of w, on one thread ("1") and two ("2").

    "kernel 1" and "kernel 2" are of the compiled function alone. Calls are repeated so that w stays
    in the caches and the second thread awake.
    """
    before, w = torch.get_num_threads(), w.clone()
    call = partial(ops.fake_quantize_, w, group_size)
    candidates: dict[str, Candidate] = {"1": call, "2": call}
    if _cpu.enabled and _cpu.native:
        dtype, ternary = _cpu.find_codes(w.dtype, TERNARY)
        group_len = resolve_group_size(w.shape[1], group_size)
        jobs = [(w.data_ptr(), w.data_ptr(), dtype, w.numel() // group_len, group_len)]
        for threads in (1, 2):
            candidates[f"kernel {threads}"] = partial(
                _cpu.native.fake_quantize, jobs, ternary, DEFAULT_EPS, threads
            )

    def time_on(name: str) -> float:
        torch.set_num_threads(int(name[-1]))
        candidates[name]()
        return time_s(candidates[name], calls)

    try:
        return interleave({name: partial(time_on, name) for name in candidates}, rounds)
    finally:
        torch.set_num_threads(before)
