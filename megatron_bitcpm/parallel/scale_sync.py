"""Scales of rows that are sharded over tensor-parallel ranks.

Each rank sums |w| over its slice of the row (`ops.abs_sums`), all ranks gather all sums, and every
rank adds them in rank order. An all-reduce would be cheaper to write and wrong: its order of
additions depends on the position in the ring and on what else is in the buffer, so the same weights
would get other scales in another call. One gather serves all layers: a row costs four bytes.
"""

from __future__ import annotations

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.parallel.linear import TernarySite
from megatron_bitcpm.quant.groups import add_in_rank_order


@torch.no_grad()
def update_shared_scales(sites: list[TernarySite]) -> None:
    """Set `scales_OG` of every site whose rows are sharded, with one all-gather per group.

    All ranks of a tensor-parallel group must call this with the same sites in the same order.
    """
    by_group: dict[int, list[TernarySite]] = {}
    for site in sites:
        if site.shares_scales:
            by_group.setdefault(id(site.tp_group), []).append(site)
    for members in by_group.values():
        _exchange(members)


def _exchange(sites: list[TernarySite]) -> None:
    group, tp_size = sites[0].tp_group, sites[0].tp_size
    sums_O = torch.cat([ops.abs_sums(site.weight.data, -1).flatten() for site in sites])
    gathered = [torch.empty_like(sums_O) for _ in range(tp_size)]
    torch.distributed.all_gather(gathered, sums_O, group=group)
    full_O = add_in_rank_order(gathered)
    parts = full_O.split([site.weight.shape[0] for site in sites])
    for site, part_O in zip(sites, parts, strict=True):
        site.scales_OG = ops.scales_from_sums(
            part_O.unsqueeze(1), site.in_features_full, site.quant.eps
        )
