"""Kernels in pure torch, for every device, and kernels that compute nothing, for fakes.

The mathematics is `megatron_bitcpm.quant`. `_operators` checks the arguments and makes them
contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_bitcpm.quant import activation, fake_quant, packing, scales


class Kernels:
    """The reference. Kernels of a device derive from it and override what they have."""

    @torch.no_grad()
    def fake_quantize(self, w: torch.Tensor, group_len: int, eps: float, grid: str) -> torch.Tensor:
        return fake_quant.fake_quantize(w, group_len, eps, grid)

    @torch.no_grad()
    def quantize(
        self, w: torch.Tensor, group_len: int, eps: float, grid: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fake_quant.quantize(w, group_len, eps, grid)

    @torch.no_grad()
    def abs_sums(self, w: torch.Tensor, group_len: int) -> torch.Tensor:
        return scales.abs_sums(w, group_len)

    @torch.no_grad()
    def fake_quantize_with_scales(
        self, w: torch.Tensor, scales_OG: torch.Tensor, grid: str
    ) -> torch.Tensor:
        return fake_quant.fake_quantize_with_scales(w, scales_OG, grid)

    @torch.no_grad()
    def fake_quantize_list(
        self, ws: Sequence[torch.Tensor], group_lens: Sequence[int], eps: float, grid: str
    ) -> None:
        for w, group_len in zip(ws, group_lens, strict=True):
            w.copy_(fake_quant.fake_quantize(w, group_len, eps, grid))

    @torch.no_grad()
    def fake_quantize_with_scales_list(
        self, ws: Sequence[torch.Tensor], scales_of_ws: Sequence[torch.Tensor], grid: str
    ) -> None:
        for w, scales_OG in zip(ws, scales_of_ws, strict=True):
            w.copy_(fake_quant.fake_quantize_with_scales(w, scales_OG, grid))

    @torch.no_grad()
    def pack2(self, codes: torch.Tensor) -> torch.Tensor:
        return packing.pack2(codes)

    @torch.no_grad()
    def unpack2(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        return packing.unpack2(packed, in_features)

    @torch.no_grad()
    def int8_per_token(self, x: torch.Tensor) -> torch.Tensor:
        return activation.int8_per_token(x)


class EmptyResults(Kernels):
    """Results of the right shape, type and layout, for fakes, and for kernels that fill them."""

    def fake_quantize(self, w: torch.Tensor, group_len: int, eps: float, grid: str) -> torch.Tensor:
        return torch.empty_like(w, memory_format=torch.contiguous_format)

    def quantize(
        self, w: torch.Tensor, group_len: int, eps: float, grid: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return w.new_empty(w.shape, dtype=torch.int8), self.abs_sums(w, group_len)

    def abs_sums(self, w: torch.Tensor, group_len: int) -> torch.Tensor:
        return w.new_empty(w.shape[0], w.shape[1] // group_len, dtype=torch.float32)

    def fake_quantize_with_scales(
        self, w: torch.Tensor, scales_OG: torch.Tensor, grid: str
    ) -> torch.Tensor:
        return torch.empty_like(w, memory_format=torch.contiguous_format)

    def pack2(self, codes: torch.Tensor) -> torch.Tensor:
        packed_len = packing.count_packed_bytes(codes.shape[1])
        return codes.new_empty(codes.shape[0], packed_len, dtype=torch.uint8)

    def unpack2(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        return packed.new_empty(packed.shape[0], in_features, dtype=torch.int8)

    def int8_per_token(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)


REFERENCE = Kernels()
EMPTY = EmptyResults()
