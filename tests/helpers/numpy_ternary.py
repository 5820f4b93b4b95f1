"""Independent quantisers in numpy: what every backend is compared with, bit for bit.

Written from docs/quantizer.md in another form than the package: ternary codes by the definition,
clamp(rint(w / s)), other grids by signed boundaries between neighbouring levels, packing by a loop
over places, bfloat16 by scaling with powers of two in float64.
"""

import numpy as np
import torch

from helpers.numpy_sums import abs_sums

NAN_BITS = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
GRIDS = ("ternary", "asym4", "half_sym4", "int_sym4", "five")
# Levels in units of the scale, the boundaries between them, the code of a level, max(|w|) / s.
TABLE = {
    "asym4": ((-2, -1, 0, 1), (-1.5, -0.5, 0.5), 1, 1.5),
    "half_sym4": ((-1.5, -0.5, 0.5, 1.5), (-1.0, 0.0, 1.0), 2, 1.5),
    "int_sym4": ((-2, -1, 1, 2), (-1.5, 0.0, 1.5), 1, 2.0),
    "five": ((-2, -1, 0, 1, 2), (-1.5, -0.5, 0.5, 1.5), 1, 2.0),
}


@np.errstate(all="ignore")
def compute_scales(w: np.ndarray, group_len: int, eps: float, grid: str) -> np.ndarray:
    if grid == "ternary":
        statistic = abs_sums(w, group_len)
        scales = statistic * (np.float32(1) / np.float32(group_len))
    else:
        # Finite magnitudes sort as their bits do; infinities and NaN are above all of them.
        bits = (w.view(np.uint32) & 0x7FFFFFFF).reshape(w.shape[0], -1, group_len)
        statistic = bits.max(2).view(np.float32)
        scales = statistic / np.float32(TABLE[grid][3])
    scales = np.maximum(scales, np.float32(eps))
    scales[~np.isfinite(statistic)] = np.nan
    return scales


def quantize(
    w: np.ndarray, group_len: int, eps: float, grid: str = "ternary"
) -> tuple[np.ndarray, np.ndarray]:
    scales = compute_scales(w, group_len, eps, grid)
    return codes_from_scales(w, scales, grid), scales


@np.errstate(all="ignore")
def codes_from_scales(w: np.ndarray, scales: np.ndarray, grid: str = "ternary") -> np.ndarray:
    w_groups, scales = w.reshape(*scales.shape, -1), scales[:, :, None]
    if grid == "ternary":
        codes = np.clip(np.rint(w_groups / scales), -1, 1)
    else:
        levels, boundaries, unit, _ = TABLE[grid]
        rank = np.zeros(w_groups.shape, np.int64)
        for boundary in boundaries:
            place = np.float32(boundary) * scales
            # A tie goes to the level nearer to zero, a zero between two of them upwards.
            rank += w_groups > place if boundary > 0 else w_groups >= place
        codes = (np.array(levels) * unit)[rank]
    usable = np.isfinite(w_groups) & np.isfinite(scales) & (scales > 0)
    return np.where(usable, codes, 0).astype(np.int8).reshape(w.shape)


@np.errstate(all="ignore")
def level_bits(
    codes: np.ndarray, scales: np.ndarray, dtype: torch.dtype, grid: str = "ternary"
) -> np.ndarray:
    """Bit patterns of level * scale in dtype; canonical NaN where the scale is not usable."""
    codes = codes.reshape(*scales.shape, -1)
    unit = TABLE[grid][2] if grid in TABLE else 1
    values = (codes / unit).astype(np.float32) * scales[:, :, None]
    bits = round_to(values, dtype)
    bad = ~(np.isfinite(scales) & (scales > 0))[:, :, None]
    bits = np.where(codes == 0, 0, bits)
    return np.where(bad, NAN_BITS[dtype], bits).reshape(codes.shape[0], -1)


@np.errstate(all="ignore")
def round_to(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bit patterns of float32 values rounded half to even to dtype, as int64; one NaN."""
    if dtype == torch.float32:
        bits = values.view(np.uint32).astype(np.int64)
    elif dtype == torch.float16:
        bits = values.astype(np.float16).view(np.uint16).astype(np.int64)
    else:
        # Eight significant bits down to 2^-126, below that steps of 2^-133.
        exponent = np.maximum(np.frexp(values.astype(np.float64))[1], -125) - 8
        steps = np.rint(np.ldexp(values.astype(np.float64), -exponent))
        rounded = np.copysign(np.ldexp(steps, exponent), values).astype(np.float32)
        rounded = np.where(np.isfinite(values), rounded, values)
        bits = rounded.view(np.uint32).astype(np.int64) >> 16
    return np.where(np.isnan(values), NAN_BITS[dtype], bits)


def pack2(codes: np.ndarray) -> np.ndarray:
    rows, cols = codes.shape
    packed = np.zeros((rows, 32 * -(-cols // 128)), np.uint8)
    for place in range(packed.shape[1] * 4):
        field = codes[:, place] + 1 if place < cols else np.ones(rows, np.int8)
        block, inside = divmod(place, 128)
        packed[:, block * 32 + inside % 32] += field.astype(np.uint8) * 4 ** (inside // 32)
    return packed


@np.errstate(all="ignore")
def int8_per_token_bits(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bit patterns of x_q in dtype; x is [tokens, I] in float32."""
    one, largest_code = np.float32(1), np.float32(127)
    largest = np.abs(x).max(1, keepdims=True)
    scale = (one / np.maximum(largest, np.float32(1e-5))) * largest_code
    codes = np.minimum(np.maximum(np.rint(x * scale), np.float32(-128)), largest_code)
    bits = round_to(codes / scale, dtype)
    return np.where(np.isfinite(largest), bits, NAN_BITS[dtype])


def bits_of(x: torch.Tensor) -> np.ndarray:
    """Bit patterns of a float tensor, as int64, for bitwise comparison."""
    width = {4: (torch.int32, 0xFFFFFFFF), 2: (torch.int16, 0xFFFF)}[x.element_size()]
    return x.contiguous().view(width[0]).numpy().astype(np.int64) & width[1]


def float32_bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns of float32 numbers, as int64, every NaN the canonical one."""
    return np.where(np.isnan(x), 0x7FC00000, x.view(np.uint32)).astype(np.int64)


def fake_quantize(
    w: torch.Tensor, group_len: int = -1, eps: float = 1e-5, grid: str = "ternary"
) -> torch.Tensor:
    """Level * scale in the type of w, [O, I]; -1 means one scale for each row."""
    values = w.float().numpy()
    codes, scales = quantize(values, w.shape[1] if group_len == -1 else group_len, eps, grid)
    return to_tensor(level_bits(codes, scales, w.dtype, grid), w.dtype)


def to_tensor(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Tensor of these bit patterns."""
    signed = {4: np.int32, 2: np.int16}[dtype.itemsize]
    return torch.from_numpy(bits.astype(np.uint32).astype(signed, casting="unsafe")).view(dtype)
