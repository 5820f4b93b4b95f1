"""Ternary codes in two bits each: reference in pure torch. Layout: docs/quantizer.md.

A row is cut into blocks of 128 inputs, each stored in 32 bytes. Byte j of a block holds the inputs
j, j + 32, j + 64 and j + 96 of the block, in bits 0-1, 2-3, 4-5 and 6-7, as field = code + 1.
Inputs past the row's end are code 0. So 32 neighbouring bytes unpack with two shifts and a mask,
and the bytes are those of the `qs` of llama.cpp's TQ2_0.

Shape legend: O out, I in, P packed bytes per row, 32 * ceil(I / 128), K blocks per row, Q quarters
of a block, J bytes of a block.
"""

from __future__ import annotations

import torch

from megatron_bitcpm.errors import BitcpmError

BLOCK_INPUTS = 128
BLOCK_BYTES = 32
SHIFTS = (0, 2, 4, 6)


def count_packed_bytes(in_features: int) -> int:
    """Return P, the bytes of a packed row of `in_features` codes."""
    return -(-in_features // BLOCK_INPUTS) * BLOCK_BYTES


def pack2(codes_OI: torch.Tensor) -> torch.Tensor:
    """Pack codes_OI, int8, [O, I], to uint8 [O, P]; raises as `refuse_bad_codes`."""
    refuse_bad_codes(codes_OI)
    out_features, in_features = codes_OI.shape
    packed_len = count_packed_bytes(in_features)
    fields_OI = codes_OI.new_ones(out_features, packed_len * len(SHIFTS), dtype=torch.uint8)
    fields_OI[:, :in_features] = (codes_OI + 1).to(torch.uint8)
    fields_OKQJ = fields_OI.reshape(out_features, packed_len // BLOCK_BYTES, 4, BLOCK_BYTES)
    packed_OKJ = torch.zeros_like(fields_OKQJ[:, :, 0])
    for quarter, shift in enumerate(SHIFTS):
        packed_OKJ |= fields_OKQJ[:, :, quarter] << shift
    return packed_OKJ.reshape(out_features, packed_len)


def unpack2(packed_OP: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return codes_OI, int8, [O, in_features], that `pack2` packed; raises `describe_bad_field`."""
    bad_O = _find_bad_fields(packed_OP).any(1)
    if bad_O.any():
        raise describe_bad_field(packed_OP, int(bad_O.nonzero()[0]))
    out_features, packed_len = packed_OP.shape
    packed_OKJ = packed_OP.reshape(out_features, packed_len // BLOCK_BYTES, BLOCK_BYTES)
    fields_OKQJ = torch.stack([(packed_OKJ >> shift) & 3 for shift in SHIFTS], dim=2)
    fields_OI = fields_OKQJ.reshape(out_features, packed_len * len(SHIFTS))
    return (fields_OI[:, :in_features].to(torch.int8) - 1).contiguous()


def refuse_bad_codes(codes_OI: torch.Tensor) -> None:
    """Raise BitcpmError, naming the first, where a code is not -1, 0 or 1."""
    bad_O = _find_bad_codes(codes_OI).any(1)
    if bad_O.any():
        raise describe_bad_code(codes_OI, int(bad_O.nonzero()[0]))


def describe_bad_code(codes_OI: torch.Tensor, row: int) -> BitcpmError:
    """Return the error for the first code of `row` that is not ternary."""
    column = int(_find_bad_codes(codes_OI[row]).nonzero()[0])
    return BitcpmError(
        f"codes[{row}, {column}]={int(codes_OI[row, column])}: two bits hold -1, 0 and 1. Pack the "
        "codes of the ternary grid."
    )


def describe_bad_field(packed_OP: torch.Tensor, row: int) -> BitcpmError:
    """Return the error for the first byte of `row` with a field of 3, also past the row's end."""
    column = int(_find_bad_fields(packed_OP[row]).nonzero()[0])
    return BitcpmError(
        f"packed[{row}, {column}]={int(packed_OP[row, column])}: a field of 3 is not a code. Pass "
        "what pack2 returned."
    )


def _find_bad_codes(codes: torch.Tensor) -> torch.Tensor:
    return (codes < -1) | (codes > 1)


def _find_bad_fields(packed: torch.Tensor) -> torch.Tensor:
    return (packed & (packed >> 1) & 0x55) != 0
