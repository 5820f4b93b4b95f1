"""How a sequence is cut over context-parallel ranks, and how its keys and values come together.

Zigzag: of 2 * cp_size equal chunks rank r has chunks r and 2 * cp_size - 1 - r, so that under a
causal mask every rank has the same work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def chunks_of_rank(cp_rank: int, cp_size: int) -> list[int]:
    """Return the numbers of the chunks that a rank holds, in the order in which it holds them."""
    return [0] if cp_size == 1 else [cp_rank, 2 * cp_size - 1 - cp_rank]


def slice_for_context_parallel(x: torch.Tensor, cp_rank: int, cp_size: int) -> torch.Tensor:
    """Return a rank's part [B, S / cp_size, ...] of sequences [B, S, ...]."""
    if cp_size == 1:
        return x
    assert x.shape[1] % (2 * cp_size) == 0, (x.shape, cp_size)
    chunks = x.chunk(2 * cp_size, dim=1)
    return torch.cat([chunks[number] for number in chunks_of_rank(cp_rank, cp_size)], dim=1)


def gather_for_context_parallel(x: torch.Tensor, cp_group: dist.ProcessGroup) -> torch.Tensor:
    """Return [S, ...], in its natural order, of each rank's part [S / cp_size, ...].

    Differentiable: every rank uses the whole sequence for its own queries, so that the gradient of
    a part is the sum over the ranks of their gradients of it.
    """
    gathered: torch.Tensor = _Gather.apply(x, cp_group)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cp_group: dist.ProcessGroup) -> torch.Tensor:
        ctx.cp_group = cp_group
        gathered = x.new_empty(cp_group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=cp_group)
        by_rank = torch.tensor(_order(cp_group.size()))
        return _reorder(gathered, by_rank.argsort().tolist())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        by_rank = _reorder(grad, _order(ctx.cp_group.size()))
        mine = grad.new_empty(grad.shape[0] // ctx.cp_group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, by_rank, group=ctx.cp_group)
        return mine, None


def _order(cp_size: int) -> list[int]:
    """The chunks of rank 0, those of rank 1, and so on."""
    return [number for rank in range(cp_size) for number in chunks_of_rank(rank, cp_size)]


def _reorder(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    chunks = x.chunk(len(order))
    return torch.cat([chunks[number] for number in order])
