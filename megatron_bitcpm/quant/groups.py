"""Where groups lie: arithmetic for full rows and for tensor-parallel shards.

Groups run along the inputs I. A group size of -1 is the whole row of the *full* weight. Column
parallelism shards O and never cuts a group. Row parallelism shards I: groups that divide the local
I are not cut either, whole-row groups are, and their sums are then added over ranks.

Shape legend: O out, I in (local shard unless `full`), G groups per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.quant.settings import WHOLE_ROW


def list_divisors(number: int) -> list[int]:
    """Return all divisors, ascending; none when number < 1."""
    small = [d for d in range(1, math.isqrt(max(number, 0)) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def find_nearest_divisors(number: int, wanted: int) -> list[int]:
    """Return the divisors of `number` nearest to `wanted`: at most one below, one at or above.

    Both are at least 1; the list is ascending and empty only when number < 1.
    """
    divisors = list_divisors(number)
    below = [d for d in divisors if d < wanted]
    above = [d for d in divisors if d >= wanted]
    return below[-1:] + above[:1]


def _list_choices(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in values)


def resolve_group_size(in_features: int, group_size: int, field: str = "group_size") -> int:
    """Turn a configured group size into the number of inputs that share a scale.

    Args:
        in_features: length of the row, I.
        group_size: at least 1 and a divisor of I, or -1 for the whole row.
        field: name used in the message.
    Returns:
        The group's length, >= 1 (0 for a row without inputs and group_size -1).
    Raises:
        BitcpmError: group_size is 0 or below -1, or does not divide I; names the nearest that do.
    """
    if group_size == WHOLE_ROW:
        return in_features
    if group_size < 1:
        raise BitcpmError(
            f"{field}={group_size}: must be at least 1, or -1 for the whole row. Use 64 or -1."
        )
    if in_features % group_size:
        choices = find_nearest_divisors(in_features, group_size)
        raise BitcpmError(
            f"{field}={group_size}: in_features {in_features} is not a multiple. Use "
            f"{_list_choices(choices)}, or -1 for the whole row."
        )
    return group_size


def count_groups(in_features: int, group_size: int) -> int:
    """Return G, groups per row; a row without inputs has none. Raises as `resolve_group_size`."""
    group_len = resolve_group_size(in_features, group_size)
    return in_features // group_len if group_len else 0


@dataclass(frozen=True)
class ShardedGroups:
    """How the groups of one linear lie on one tensor-parallel rank.

    Attributes:
        local_group_size: what the rank passes to the operators (-1 = its whole local row).
        scale_len: inputs behind one scale, the `n` of the mean; larger than the local row when
            sums are exchanged.
        needs_sum_exchange: the ranks' sums must be gathered and added in rank order.
    """

    local_group_size: int
    scale_len: int
    needs_sum_exchange: bool


def resolve_sharded_groups(
    in_features_full: int,
    tp_size: int,
    group_size: int,
    parallel: Literal["column", "row"],
    scale_sync: Literal["exact", "local"] = "exact",
    field: str = "quant.group_size",
) -> ShardedGroups:
    """Lay the groups of a full weight over tensor-parallel ranks.

    Args:
        in_features_full: inputs of the full weight.
        tp_size: tensor-parallel ranks; row parallelism gives each `in_features_full / tp_size`.
        group_size: as configured, -1 for the whole full row.
        parallel: which dimension is sharded, "column" (O) or "row" (I).
        scale_sync: for whole rows cut by row parallelism: "exact" adds the sums of all ranks,
            "local" gives each shard its own scale, which is a group of I / tp.
        field: name used in messages.
    Raises:
        BitcpmError: a group would straddle two ranks; names the nearest settings that work.
    """
    if parallel == "column" or tp_size == 1:
        group_len = resolve_group_size(in_features_full, group_size, field)
        return ShardedGroups(group_size, group_len, needs_sum_exchange=False)
    if in_features_full % tp_size:
        choices = find_nearest_divisors(in_features_full, tp_size)
        raise BitcpmError(
            f"tp={tp_size}: in_features {in_features_full} of a row-parallel linear is not a "
            f"multiple. Use tp {_list_choices(choices)}."
        )
    local = in_features_full // tp_size
    if group_size == WHOLE_ROW:
        if scale_sync == "exact":
            return ShardedGroups(WHOLE_ROW, in_features_full, needs_sum_exchange=True)
        return ShardedGroups(WHOLE_ROW, local, needs_sum_exchange=False)
    if group_size < 1 or in_features_full % group_size:
        resolve_group_size(in_features_full, group_size, field)
    if local % group_size:
        choices = find_nearest_divisors(local, group_size)
        # Fewer, larger shards may hold whole groups where these do not.
        fewer = next(
            tp for tp in range(tp_size - 1, 0, -1) if _fits(in_features_full, tp, group_size)
        )
        raise BitcpmError(
            f"{field}={group_size}: local in_features {local} ({in_features_full} / tp {tp_size}) "
            f"is not a multiple. Use {_list_choices(choices)}, or tp {fewer}."
        )
    return ShardedGroups(group_size, group_size, needs_sum_exchange=False)


def _fits(in_features_full: int, tp_size: int, group_size: int) -> bool:
    return in_features_full % tp_size == 0 and (in_features_full // tp_size) % group_size == 0


def add_in_rank_order(sums_per_rank: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add the ranks' group sums, rank 0 first: ((s0 + s1) + s2) + ...

    An all-reduce has no defined order, so ranks gather the sums and each adds them like this.

    Args:
        sums_per_rank: one float32 tensor per rank, equal shapes, in rank order; at least one.
    Returns:
        A new float32 tensor of that shape.
    """
    if not sums_per_rank:
        raise BitcpmError("sums_per_rank=[]: needs one tensor per rank. Pass at least one.")
    total = sums_per_rank[0].clone()
    for sums in sums_per_rank[1:]:
        total += sums
    return total
