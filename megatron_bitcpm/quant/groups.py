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
    """Return the divisors of `number` nearest to `wanted`: at most one below, one at or above."""
    divisors = list_divisors(number)
    below = [d for d in divisors if d < wanted]
    above = [d for d in divisors if d >= wanted]
    return below[-1:] + above[:1]


def _suggest(number: int, wanted: int) -> str:
    return " or ".join(str(divisor) for divisor in find_nearest_divisors(number, wanted))


def resolve_group_size(in_features: int, group_size: int, field: str = "group_size") -> int:
    """Return the number of inputs that share a scale; 0 for a row without inputs and size -1.

    Raises BitcpmError, about `field`, unless group_size is -1 or a divisor of I; names the nearest.
    """
    if group_size == WHOLE_ROW:
        return in_features
    if group_size < 1:
        raise BitcpmError(
            f"{field}={group_size}: must be at least 1, or -1 for the whole row. Use 64 or -1."
        )
    if in_features % group_size:
        raise BitcpmError(
            f"{field}={group_size}: in_features {in_features} is not a multiple. Use "
            f"{_suggest(in_features, group_size)}, or -1 for the whole row."
        )
    return group_size


def count_groups(in_features: int, group_size: int) -> int:
    """Return G, groups per row; a row without inputs has none. Raises as `resolve_group_size`."""
    group_len = resolve_group_size(in_features, group_size)
    return in_features // group_len if group_len else 0


@dataclass(frozen=True)
class ShardedGroups:
    """How the groups of one linear lie on one tensor-parallel rank."""

    local_group_size: int
    """What the rank passes to the operators; -1 is its whole local row."""
    scale_len: int
    """Inputs behind one scale, the `n` of the mean; with an exchange more than the local row."""
    needs_sum_exchange: bool
    """The ranks' sums must be gathered and added in rank order."""


def resolve_sharded_groups(
    in_features_full: int,
    tp_size: int,
    group_size: int,
    parallel: Literal["column", "row"],
    scale_sync: Literal["exact", "local"] = "exact",
    field: str = "quant.group_size",
) -> ShardedGroups:
    """Lay the groups of a full weight over tensor-parallel ranks.

    For whole rows cut by row parallelism `scale_sync` "exact" adds the sums of all ranks, "local"
    gives each shard its own scale, which is a group of I / tp. Raises BitcpmError, about `field`,
    where a group would straddle two ranks; names the nearest settings that work.
    """
    if parallel == "column" or tp_size == 1:
        group_len = resolve_group_size(in_features_full, group_size, field)
        return ShardedGroups(group_size, group_len, needs_sum_exchange=False)
    if in_features_full % tp_size:
        raise BitcpmError(
            f"tp={tp_size}: in_features {in_features_full} of a row-parallel linear is not a "
            f"multiple. Use tp {_suggest(in_features_full, tp_size)}."
        )
    local = in_features_full // tp_size
    if group_size == WHOLE_ROW:
        if scale_sync == "exact":
            return ShardedGroups(WHOLE_ROW, in_features_full, needs_sum_exchange=True)
        return ShardedGroups(WHOLE_ROW, local, needs_sum_exchange=False)
    if group_size < 1 or in_features_full % group_size:
        resolve_group_size(in_features_full, group_size, field)
    if local % group_size:
        # Fewer, larger shards may hold whole groups where these do not.
        fewer = next(
            tp for tp in range(tp_size - 1, 0, -1) if _fits(in_features_full, tp, group_size)
        )
        raise BitcpmError(
            f"{field}={group_size}: local in_features {local} ({in_features_full} / tp {tp_size}) "
            f"is not a multiple. Use {_suggest(local, group_size)}, or tp {fewer}."
        )
    return ShardedGroups(group_size, group_size, needs_sum_exchange=False)


def _fits(in_features_full: int, tp_size: int, group_size: int) -> bool:
    return in_features_full % tp_size == 0 and (in_features_full // tp_size) % group_size == 0


def add_in_rank_order(sums_per_rank: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add the ranks' group sums, float32 of equal shapes, rank 0 first: ((s0 + s1) + s2) + ...

    An all-reduce has no defined order, so ranks gather the sums and each adds them like this.
    """
    if not sums_per_rank:
        raise BitcpmError("sums_per_rank=[]: needs one tensor per rank. Pass at least one.")
    total = sums_per_rank[0].clone()
    for sums in sums_per_rank[1:]:
        total += sums
    return total
