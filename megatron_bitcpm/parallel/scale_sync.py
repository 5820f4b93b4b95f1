"""Scales that a rank cannot know alone: of rows and projections that span tensor-parallel ranks.

Each rank takes the statistic of its part of each row: the sum of |w| (`ops.abs_sums`), or for grids
whose scale follows the largest |w| the scale of that part, see `projections`. All ranks gather all
of them, and every rank puts them together in rank order. An all-reduce would be cheaper to write
and wrong: its order of additions depends on the position in the ring and on what else is in the
buffer, so the same weights would get other scales in another call. One gather serves all layers: a
row costs four bytes.
"""

from __future__ import annotations

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.parallel.projections import (
    join_ranks,
    projection_scales,
    scales_of_statistics,
)
from megatron_bitcpm.parallel.site import TernarySite


@torch.no_grad()
def update_given_scales(sites: list[TernarySite]) -> None:
    """Set `scales_OG` of every site that is quantised with given scales.

    One all-gather for each tensor-parallel group of several ranks. All ranks of a group must call
    this with the same sites in the same order.
    """
    by_group: dict[int, list[TernarySite]] = {}
    for site in sites:
        if site.takes_scales:
            by_group.setdefault(id(site.tp_group), []).append(site)
    for members in by_group.values():
        _exchange(members)


def _exchange(sites: list[TernarySite]) -> None:
    group, tp_size = sites[0].tp_group, sites[0].tp_size
    stats = torch.cat([_row_statistics(site) for site in sites])
    gathered = [stats]
    if tp_size > 1:
        gathered = [torch.empty_like(stats) for _ in range(tp_size)]
        torch.distributed.all_gather(gathered, stats, group=group)
    rows = [site.weight.shape[0] for site in sites]
    per_site = zip(*(part.split(rows) for part in gathered), strict=True)
    for site, parts in zip(sites, per_site, strict=True):
        site.scales_OG = _scales(site, list(parts))


def _row_statistics(site: TernarySite) -> torch.Tensor:
    """Return the statistic of each local row, float32 [O]."""
    quant, w_OI = site.quant, site.weight.data
    if quant.grid == "ternary":
        return ops.abs_sums(w_OI, -1).flatten()
    return ops.quantize(w_OI, -1, quant.eps, quant.grid)[1].flatten()


def _scales(site: TernarySite, parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the scales of a site's local rows, float32 [O, 1], from the ranks' statistics."""
    quant, rows = site.quant, site.projection_rows
    stats = join_ranks(parts, rows, site.row_parallel, quant.grid)
    if rows is None:
        return scales_of_statistics(
            stats.unsqueeze(1), site.in_features_full, quant.eps, quant.grid
        )
    scales = projection_scales(stats, rows, site.in_features_full, quant.eps, quant.grid)
    if not site.row_parallel and site.tp_size > 1:
        rank = torch.distributed.get_rank(site.tp_group)
        scales = scales[rows.rows_of_rank(len(scales), site.tp_size, rank, scales.device)]
    return scales
