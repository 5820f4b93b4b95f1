"""The ternary grid {-1, 0, 1} with one scale per group: reference in pure torch.

For a group of n weights along the inputs (float32 arithmetic throughout, no contraction):

    s    = max(sum(|w|) * float32(1 / n), eps)      mean of absolute values
    code = clamp(rint(w / s), -1, 1)                ties to even, so |w| = s/2 gives 0
    wq   = code * s                                 rounded once, to the dtype of w

Source: BitCPM-CANN technical report, section 3.1, eqs. 1-2. The report leaves the order of the sum
and the rounding open; here they are fixed, see `megatron_bitcpm.quant.sums` and docs/quantizer.md.

The codes are computed as ``sign(w) if 2|w| > s else 0``: equal for every float32 input, without a
division. ``w * (1 / s)`` is NOT equal: it flips codes one ulp above s/2.

A group whose sum is not finite (NaN or inf inside, or overflow of finite weights) gets a NaN scale,
codes 0 and NaN wq, so that a diverging run is seen. An all-zero group has s = eps, codes 0, wq 0.
Zeros of wq are +0 and NaNs are the canonical quiet NaN, whatever the sign of w.

Shape legend: O out, I in, G groups per row.
"""

from __future__ import annotations

import ctypes
import math

import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.groups import resolve_group_size
from megatron_bitcpm.quant.sums import sum_abs_canonical

DEFAULT_EPS = 1e-5
# Below the smallest normal float32 the scale itself would depend on flush-to-zero settings.
SMALLEST_EPS = 2.0**-126


def round_to_float32(value: float) -> float:
    """Return `value` rounded to the nearest float32, as a Python float."""
    return ctypes.c_float(value).value


def check_eps(eps: float) -> None:
    """Raise BitcpmError unless eps is finite and at least 2^-126, the smallest normal float32."""
    if not SMALLEST_EPS <= eps <= 3.4e38:
        raise BitcpmError.of(
            "eps", eps, "the smallest scale must be a positive normal float32", "Use 1e-5"
        )


def abs_sums(w_OI: torch.Tensor, group_size: int = -1) -> torch.Tensor:
    """Sum absolute values per group in the canonical order: float32 sums_OG, [O, G]."""
    return sum_abs_canonical(w_OI, resolve_group_size(w_OI.shape[1], group_size))


def scales_from_sums(sums: torch.Tensor, n: int, eps: float = DEFAULT_EPS) -> torch.Tensor:
    """Turn sums of absolute values into scales: ``max(sum * float32(1 / n), eps)``.

    Args:
        sums: float32, any shape, units of w.
        n: inputs behind each sum (the full row's length when sums of ranks were added), >= 1.
        eps: smallest scale, units of w.
    Returns:
        Scales of the same shape, float32; NaN where the sum is not finite.
    Raises:
        BitcpmError: n < 1, or eps not a positive normal float32.
    """
    check_eps(eps)
    if n < 1:
        raise BitcpmError.of("n", n, "a mean needs at least one input", "Pass the group's length")
    scales = (sums * round_to_float32(1.0 / n)).clamp(min=round_to_float32(eps))
    return scales.masked_fill(~sums.isfinite(), math.nan)


def codes_from_scales(w_OI: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """Return int8 codes_OI, [O, I], of w under given scales; 0 where w or its scale is not usable.

    Groups have I / G inputs. A scale is usable when it is positive and finite.
    """
    w_OGI = _split_groups(w_OI, scales_OG)
    doubled_OGI = w_OGI.to(torch.float32).abs() * 2
    # No number exceeds an infinite scale, so unusable scales give 0 like small weights do.
    scales_OG1 = scales_OG.where(_find_usable(scales_OG), math.inf).unsqueeze(-1)
    nonzero_OGI = (doubled_OGI > scales_OG1) & w_OGI.isfinite()
    return (w_OGI.sign().to(torch.int8) * nonzero_OGI).reshape(w_OI.shape)


def fake_quantize_with_scales(w_OI: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """Return wq_OI = code * scale in the dtype of w, [O, I].

    NaN where w is not finite, and in the whole group where the scale is not positive and finite.
    """
    codes_OGI = _split_groups(codes_from_scales(w_OI, scales_OG), scales_OG)
    # A code is -1, 0 or 1, so the only rounding is that of the scale. An int8 zero has no sign:
    # zeros of wq are +0.
    level_OG1 = scales_OG.to(w_OI.dtype).unsqueeze(-1)
    wq_OGI = torch.where(codes_OGI != 0, codes_OGI * level_OG1, 0.0)
    # Filled last: torch's vectorised float32 -> bfloat16 has another NaN than its scalar one.
    bad_OGI = ~(_split_groups(w_OI, scales_OG).isfinite() & _find_usable(scales_OG).unsqueeze(-1))
    return wq_OGI.masked_fill(bad_OGI, math.nan).reshape(w_OI.shape)


def quantize(
    w_OI: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a latent weight to ternary codes, one scale per group of inputs.

    Args:
        w_OI: latent weight, [O, I], float32/bfloat16/float16, any device.
        group_size: inputs per scale; must divide I; -1 means I.
        eps: smallest scale, in units of w.
    Returns:
        codes_OI: int8 in {-1, 0, 1}, [O, I].  scales_OG: float32, units of w, [O, G].
    Raises:
        BitcpmError: I is not a multiple of group_size, or eps is out of range.
    Rounding: half to even. Arithmetic in float32 whatever the input type.
    Source: BitCPM-CANN technical report, section 3.1, eqs. 1-2.
    """
    scales_OG = _compute_scales(w_OI, group_size, eps)
    return codes_from_scales(w_OI, scales_OG), scales_OG


def fake_quantize(
    w_OI: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS
) -> torch.Tensor:
    """Return wq_OI, codes times scales in the dtype of w, [O, I]; arguments as `quantize`."""
    return fake_quantize_with_scales(w_OI, _compute_scales(w_OI, group_size, eps))


def _compute_scales(w_OI: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    check_eps(eps)
    group_len = resolve_group_size(w_OI.shape[1], group_size)
    sums_OG = sum_abs_canonical(w_OI, group_len)
    return scales_from_sums(sums_OG, max(group_len, 1), eps)


def _split_groups(x_OI: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    out_features, in_features = x_OI.shape
    num_groups = scales_OG.shape[1]
    return x_OI.reshape(out_features, num_groups, in_features // num_groups if num_groups else 0)


def _find_usable(scales_OG: torch.Tensor) -> torch.Tensor:
    return scales_OG.isfinite() & (scales_OG > 0)
