"""The ternary quantiser in the arithmetic inferred for the released BitCPM latents.

Every step is rounded to the dtype of w, and the weight is multiplied with the reciprocal of the
mean instead of divided by the mean:

    mean = max(dtype(canonical float32 sum of |w| * float32(1 / n)), dtype(eps))
    code = clamp(rint(dtype(w * dtype(1 / mean))), -1, 1)        ties to even
    wq   = dtype(code * mean)

Inferred from published outside evidence about the released latents, not read in their code: the
order of their sum is not known, and where it decides a rounding of the mean, codes differ. In
bfloat16 the rounded product often lies exactly on 0.5, so that many codes differ from those of the
float32 arithmetic of `quant.fake_quant`. A model is quantised in one arithmetic from its training
to its files; which one is part of its stamp.

Non-finite values, zeros: as in `quant.fake_quant`.

Shape legend: O out, I in, G groups per row.
"""

from __future__ import annotations

import math

import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.scales import check_eps


def quantize_reciprocal(
    w_OI: torch.Tensor, sums_OG: torch.Tensor, n: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes_OI, int8, 0 in groups that are not finite, and scales_OG, float32, NaN there.

    `sums_OG` are float32 sums of |w|, each of `n` weights: of `scales.abs_sums`, or of several
    slices added in rank order. Raises BitcpmError unless w_OI, [O, I], is bfloat16 or float32.
    """
    codes_OGI, mean_OG, bad_OG = _quantize(w_OI, sums_OG, n, eps)
    codes_OGI = codes_OGI.masked_fill_(bad_OG.unsqueeze(-1), 0)
    scales_OG = mean_OG.to(torch.float32).masked_fill_(bad_OG, math.nan)
    return codes_OGI.to(torch.int8).reshape(w_OI.shape), scales_OG


def fake_quantize_reciprocal(
    w_OI: torch.Tensor, sums_OG: torch.Tensor, n: int, eps: float
) -> torch.Tensor:
    """Return wq_OI, codes times means, in the dtype of w; as `quantize_reciprocal`."""
    wq_OGI, mean_OG, bad_OG = _quantize(w_OI, sums_OG, n, eps)
    # Adding 0 turns -0 into +0.
    wq_OGI.add_(0.0).mul_(mean_OG.unsqueeze(-1))
    return wq_OGI.masked_fill_(bad_OG.unsqueeze(-1), math.nan).reshape(w_OI.shape)


def _quantize(
    w_OI: torch.Tensor, sums_OG: torch.Tensor, n: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes in the dtype of w, [O, G, inputs], means, and which groups are not finite."""
    # Float16 has no room for the reciprocal of a small mean.
    if w_OI.dtype not in (torch.bfloat16, torch.float32):
        raise BitcpmError(
            f"numerics=bf16_reciprocal: needs bfloat16 or float32 weights, not {w_OI.dtype}. Use "
            "numerics fp32."
        )
    check_eps(eps)
    # Tensors, not Python numbers, which some devices keep in double precision.
    reciprocal_n = torch.full((), 1.0 / n, dtype=torch.float32, device=w_OI.device)
    mean_OG = (sums_OG * reciprocal_n).to(w_OI.dtype)
    mean_OG = torch.maximum(mean_OG, torch.full_like(mean_OG, eps))
    bad_OG = ~(sums_OG.isfinite() & mean_OG.isfinite())
    w_OGI = w_OI.reshape(w_OI.shape[0], sums_OG.shape[1], -1)
    codes_OGI = w_OGI * mean_OG.reciprocal().unsqueeze(-1)
    return codes_OGI.round_().clamp_(-1, 1), mean_OG, bad_OG
