"""The operators over the kernels of a device: check the arguments, call a kernel, store the result.

Kernels know no wrong arguments: they get whole groups, a length of at least 1 and contiguous
tensors. So here, and nowhere else, every property that compiled kernels rely on is checked. A
weight that is not contiguous is copied; the in-place forms copy the result back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_bitcpm.ops import _checks
from megatron_bitcpm.ops._reference import Kernels
from megatron_bitcpm.quant.grids import TERNARY, find_grid
from megatron_bitcpm.quant.groups import resolve_group_size
from megatron_bitcpm.quant.scales import check_eps
from megatron_bitcpm.quant.settings import DEFAULT_EPS


class Operators:
    """The operators of one device, under the names and arguments of their schemas.

    `choose` returns the kernels that take these tensors and this grid. Fakes have no memory to
    check, to copy or to write.
    """

    def __init__(
        self, choose: Callable[[Sequence[torch.Tensor], str], Kernels], has_memory: bool = True
    ) -> None:
        self._choose = choose
        self._has_memory = has_memory

    def fake_quantize(
        self, w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
    ) -> torch.Tensor:
        group_len = self._check_groups(w, group_size, eps, grid)
        return self._choose([w], grid).fake_quantize(self._flatten(w), group_len, eps, grid)

    def quantize(
        self, w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group_len = self._check_groups(w, group_size, eps, grid)
        return self._choose([w], grid).quantize(self._flatten(w), group_len, eps, grid)

    def abs_sums(self, w: torch.Tensor, group_size: int = -1) -> torch.Tensor:
        group_len = self._check_groups(w, group_size, DEFAULT_EPS, TERNARY)
        return self._choose([w], TERNARY).abs_sums(self._flatten(w), group_len)

    def fake_quantize_with_scales(
        self, w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
    ) -> torch.Tensor:
        self._check_scales(w, scales, grid)
        kernels = self._choose([w, scales], grid)
        return kernels.fake_quantize_with_scales(self._flatten(w), self._flatten(scales), grid)

    def fake_quantize_(
        self, w: torch.Tensor, group_size: int = -1, eps: float = DEFAULT_EPS, grid: str = TERNARY
    ) -> None:
        group_len = self._check_groups(w, group_size, eps, grid)
        self._overwrite([w], [group_len], eps, grid)

    def fake_quantize_with_scales_(
        self, w: torch.Tensor, scales: torch.Tensor, grid: str = TERNARY
    ) -> None:
        self._check_scales(w, scales, grid)
        self._overwrite_with_scales([w], [scales], grid)

    def foreach_fake_quantize_(
        self,
        ws: Sequence[torch.Tensor],
        group_size: int = -1,
        eps: float = DEFAULT_EPS,
        grid: str = TERNARY,
    ) -> None:
        self._check_list(ws)
        check_eps(eps)
        find_grid(grid)
        group_lens = [
            resolve_group_size(w.shape[1], group_size, f"ws[{index}].group_size") or 1
            for index, w in enumerate(ws)
        ]
        self._overwrite(ws, group_lens, eps, grid)

    def foreach_fake_quantize_with_scales_(
        self, ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], grid: str = TERNARY
    ) -> None:
        self._check_list(ws, scales)
        find_grid(grid)
        self._overwrite_with_scales(ws, scales, grid)

    def pack2(self, codes: torch.Tensor) -> torch.Tensor:
        _checks.check_codes(codes)
        self._check_memory(codes, "codes")
        return self._choose([codes], TERNARY).pack2(self._flatten(codes))

    def unpack2(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        _checks.check_packed(packed, in_features)
        self._check_memory(packed, "packed")
        return self._choose([packed], TERNARY).unpack2(self._flatten(packed), in_features)

    def int8_per_token(self, x: torch.Tensor) -> torch.Tensor:
        _checks.check_activation(x)
        self._check_memory(x, "x")
        return self._choose([x], TERNARY).int8_per_token(self._flatten(x))

    def _check_groups(self, w: torch.Tensor, group_size: int, eps: float, grid: str) -> int:
        """Return the length of a group; 1 for a row without inputs, which has no groups."""
        _checks.check_weight(w)
        self._check_memory(w, "w")
        check_eps(eps)
        find_grid(grid)
        return resolve_group_size(w.shape[1], group_size) or 1

    def _check_scales(self, w: torch.Tensor, scales: torch.Tensor, grid: str) -> None:
        _checks.check_weight(w)
        _checks.check_scales(w, scales)
        self._check_memory(w, "w")
        self._check_memory(scales, "scales")
        find_grid(grid)

    def _check_list(
        self, ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor] | None = None
    ) -> None:
        _checks.check_list(ws, scales)
        for name, tensors in (("ws", ws), ("scales", scales or ())):
            for index, x in enumerate(tensors):
                self._check_memory(x, f"{name}[{index}]")

    def _check_memory(self, x: torch.Tensor, name: str) -> None:
        if self._has_memory:
            _checks.check_memory(x, name)

    def _flatten(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous() if self._has_memory else x

    def _overwrite(
        self, ws: Sequence[torch.Tensor], group_lens: list[int], eps: float, grid: str
    ) -> None:
        if not self._has_memory:
            return
        flats = [w.contiguous() for w in ws]
        # One contiguous weight cannot overlap; the look costs as much as 100,000 weights.
        if len(ws) != 1 or flats[0] is not ws[0]:
            _checks.check_written(ws)
        self._choose(ws, grid).fake_quantize_list(flats, group_lens, eps, grid)
        _store(ws, flats)

    def _overwrite_with_scales(
        self, ws: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], grid: str
    ) -> None:
        if not self._has_memory:
            return
        _checks.check_written(ws, scales)
        flats = [w.contiguous() for w in ws]
        flat_scales = [scales_OG.contiguous() for scales_OG in scales]
        kernels = self._choose([*ws, *scales], grid)
        kernels.fake_quantize_with_scales_list(flats, flat_scales, grid)
        _store(ws, flats)


def _store(ws: Sequence[torch.Tensor], flats: Sequence[torch.Tensor]) -> None:
    for w, flat in zip(ws, flats, strict=True):
        if flat is w:
            # Autograd must notice that a tensor it saved has changed behind its back.
            torch.autograd.graph.increment_version(w)
        else:
            with torch.no_grad():
                w.copy_(flat)
