"""An independent ternary quantiser in numpy float32: what the operators are compared with.

Codes by the definition, clamp(rint(w / s)), where the package compares 2|w| with s.
"""

import numpy as np
import torch

NAN_BITS = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


@np.errstate(all="ignore")
def abs_sums(w: np.ndarray, group_len: int) -> np.ndarray:
    x = np.abs(w).reshape(w.shape[0], -1, group_len)
    x = np.pad(x, ((0, 0), (0, 0), (0, -group_len % 64)))
    lanes = np.zeros((*x.shape[:2], 64), np.float32)
    for k in range(0, x.shape[2], 64):
        lanes = lanes + x[:, :, k : k + 64]
    while lanes.shape[2] > 1:
        lanes = lanes[:, :, ::2] + lanes[:, :, 1::2]
    return lanes[:, :, 0]


@np.errstate(all="ignore")
def quantize(w: np.ndarray, group_len: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    sums = abs_sums(w, group_len)
    scales = np.maximum(sums * (np.float32(1) / np.float32(group_len)), np.float32(eps))
    scales[~np.isfinite(sums)] = np.nan
    return codes_from_scales(w, scales), scales


@np.errstate(all="ignore")
def codes_from_scales(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    w_groups, scales = w.reshape(*scales.shape, -1), scales[:, :, None]
    codes = np.clip(np.rint(w_groups / scales), -1, 1)
    usable = np.isfinite(w_groups) & np.isfinite(scales)
    return np.where(usable, codes, 0).astype(np.int8).reshape(w.shape)


@np.errstate(all="ignore")
def level_bits(codes: np.ndarray, scales: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bit patterns of codes * scales in dtype; canonical NaN where the scale is NaN."""
    codes = codes.reshape(*scales.shape, -1)
    values = codes.astype(np.float32) * scales[:, :, None]
    if dtype == torch.float32:
        bits = values.view(np.uint32).astype(np.int64)
    elif dtype == torch.float16:
        bits = values.astype(np.float16).view(np.uint16).astype(np.int64)
    else:
        # Eight significant bits; np.rint is half to even. No bfloat16 subnormals here: s >= eps.
        fraction, exponent = np.frexp(values.astype(np.float64))
        rounded = np.ldexp(np.rint(fraction * 256), exponent - 8).astype(np.float32)
        bits = rounded.view(np.uint32).astype(np.int64) >> 16
    bits = np.where(np.isnan(values), NAN_BITS[dtype], bits)
    return np.where((codes == 0) & ~np.isnan(values), 0, bits).reshape(codes.shape[0], -1)


def bits_of(x: torch.Tensor) -> np.ndarray:
    """Bit patterns of a float tensor, as int64, for bitwise comparison."""
    width = {4: (torch.int32, 0xFFFFFFFF), 2: (torch.int16, 0xFFFF)}[x.element_size()]
    return x.contiguous().view(width[0]).numpy().astype(np.int64) & width[1]
