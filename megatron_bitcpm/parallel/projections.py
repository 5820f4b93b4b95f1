"""One scale per Hugging Face projection, inside Megatron's fused and sharded weights.

`quant.group_size: tensor` gives each of q, k, v, o, gate, up and down one scale, whatever weight of
Megatron it is a part of and however that is cut:

    row statistic    the canonical sum of |w| over the full row (ternary), or its scale
    scale            of the statistics of a projection's rows, in Hugging Face's order: the
                     canonical sum of that vector over the number of weights, or its largest entry

Scales that follow the largest |w| are max(largest / divisor, eps). Neither the division nor the
bound changes an order, so the scale of several parts is the largest of theirs, bit for bit, and
NaN where one of them is.

A row's statistic comes first, so column parallelism, which moves whole rows, changes no bit. Here
are the order of the rows and the second line; `scale_sync` and `conversion.stamp` both
call it, each with full rows from another source. Nothing here needs Megatron.

Shape legend: O outputs of the *full* weight, L of the local shard, I inputs of the full row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.quant.groups import add_in_rank_order


def split_query_groups(
    x: torch.Tensor, num_query_groups: int, num_attention_heads: int, head_dim: int
) -> tuple[torch.Tensor, ...]:
    """Split the rows of a full linear_qkv into those of q, k and v.

    They are interleaved by query group: its query heads, its key head, its value head.

    Args:
        x: [O, ...], O = groups * (heads / groups + 2) * head_dim: the weight, or a number per row.
        num_query_groups: key/value heads; divides the query heads.
        num_attention_heads: query heads.
        head_dim: channels per head.
    Returns:
        q [heads * head_dim, ...], k and v [groups * head_dim, ...].
    """
    rest = x.shape[1:]
    heads = num_attention_heads // num_query_groups
    grouped = x.view(num_query_groups, heads + 2, head_dim, *rest)
    return tuple(part.reshape(-1, *rest) for part in grouped.split((heads, 1, 1), dim=1))


@dataclass(frozen=True)
class ProjectionRows:
    """Which rows of a full weight belong to which projection.

    Attributes:
        projections: names below a Hugging Face layer's block: ("q", "k", "v"), ("gate", "up"), ...
        num_query_groups, num_attention_heads, head_dim: of the attention; used by q, k, v.
    """

    projections: tuple[str, ...]
    num_query_groups: int = 0
    num_attention_heads: int = 0
    head_dim: int = 0

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split [O, ...] into one part per projection, rows in Hugging Face's order."""
        if self.projections == ("q", "k", "v"):
            return split_query_groups(
                x, self.num_query_groups, self.num_attention_heads, self.head_dim
            )
        return tuple(x.chunk(len(self.projections)))

    def rows_of_rank(
        self, out_features: int, tp_size: int, rank: int, device: torch.device
    ) -> torch.Tensor:
        """Return which full row each local row of a column-parallel shard is, int64 [L].

        Ranks hold consecutive rows; of gate and up each rank holds its part of both. With fewer
        query groups than ranks the cuts fall inside a group, which changes nothing here.

        Args:
            out_features: rows of the full weight, O.
            tp_size: ranks that share it.
            rank: one of them.
            device: where the result is.
        """
        rows_O = torch.arange(out_features, device=device)
        if self.projections == ("gate", "up"):
            return torch.cat([half.chunk(tp_size)[rank] for half in rows_O.chunk(2)])
        return rows_O.chunk(tp_size)[rank]


def join_ranks(
    parts: list[torch.Tensor], rows: ProjectionRows | None, row_parallel: bool, grid: str
) -> torch.Tensor:
    """Put the ranks' row statistics together.

    Args:
        parts: float32 [L], one per tensor-parallel rank, in rank order.
        rows: the layout of a column-parallel weight.
        row_parallel: each rank has a slice of every row, rather than some of the rows.
        grid: decides whether slices are added, in rank order, or the larger one counts.
    Returns:
        float32 [O], in the order of the full weight.
    """
    if row_parallel:
        if grid == "ternary":
            return add_in_rank_order(parts)
        return torch.stack(parts).amax(0)
    assert rows is not None
    full_O = parts[0].new_empty(sum(part.numel() for part in parts))
    for rank, part in enumerate(parts):
        full_O[rows.rows_of_rank(full_O.numel(), len(parts), rank, full_O.device)] = part
    return full_O


def scales_of_statistics(
    stats: torch.Tensor, num_weights: int, eps: float, grid: str
) -> torch.Tensor:
    """Turn statistics into scales, float32 of the same shape.

    Args:
        stats: sums of |w| (ternary) or scales already (other grids), float32.
        num_weights: weights behind each of them.
        eps: smallest scale, in units of w.
        grid: name of the grid.
    """
    if grid == "ternary":
        return ops.scales_from_sums(stats, num_weights, eps)
    return stats


def projection_scales(
    stats_O: torch.Tensor, rows: ProjectionRows, in_features: int, eps: float, grid: str
) -> torch.Tensor:
    """Return the scale of each row of a full weight, float32 [O, 1], one value per projection.

    Args:
        stats_O: statistics of the full rows, float32 [O].
        rows: which row is whose.
        in_features: inputs of a full row, I.
        eps: smallest scale, in units of w.
        grid: name of the grid.
    """
    scales_O = torch.empty_like(stats_O)
    indices_O = torch.arange(stats_O.numel(), device=stats_O.device)
    for part in rows.split(indices_O):
        vector = stats_O[part]
        if grid == "ternary":
            stat = ops.abs_sums(vector.unsqueeze(0), -1)[0]
        else:
            stat = vector.amax(0, keepdim=True)
        scales_O[part] = scales_of_statistics(stat, part.numel() * in_features, eps, grid)
    return scales_O.unsqueeze(1)
