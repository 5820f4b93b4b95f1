"""Scales that a rank cannot know alone: of rows and projections that span tensor-parallel ranks.

All ranks gather the statistics of all parts of rows, see `quantizer`, and put them together in rank
order. An all-reduce would be wrong: its order of additions depends on the position in the ring and
on what else is in the buffer, so the same weights would get other scales in another call. One
gather serves all layers: a row costs four bytes.
"""

from __future__ import annotations

import torch

from megatron_bitcpm.parallel.site import TernarySite


@torch.no_grad()
def update_given_scales(sites: list[TernarySite]) -> None:
    """Set `scales_OG` of the sites that take scales; collective, the same sites in one order."""
    by_group: dict[int, list[TernarySite]] = {}
    for site in sites:
        if site.takes_scales:
            by_group.setdefault(id(site.tp_group), []).append(site)
    for members in by_group.values():
        _exchange(members)


def _exchange(sites: list[TernarySite]) -> None:
    group, tp_size = sites[0].tp_group, sites[0].quantizer.tp_size
    stats = torch.cat([site.quantizer.row_statistics(site.weight.data) for site in sites])
    gathered = [stats]
    if tp_size > 1:
        gathered = [torch.empty_like(stats) for _ in range(tp_size)]
        torch.distributed.all_gather(gathered, stats, group=group)
    rows = [site.weight.shape[0] for site in sites]
    per_site = zip(*(part.split(rows) for part in gathered), strict=True)
    for site, parts in zip(sites, per_site, strict=True):
        site.scales_OG = _scales(site, list(parts))


def _scales(site: TernarySite, parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the scales of a site's local rows, float32 [O, 1], from the ranks' statistics."""
    quantizer = site.quantizer
    if site.fused is None:
        return quantizer.scales_of(quantizer.combine(parts).unsqueeze(1), site.in_features_full)
    spec, dims = site.fused
    stats = quantizer.combine(parts) if site.row_parallel else spec.join_ranks(parts, dims)
    scales = quantizer.projection_scales(stats, spec, dims, site.in_features_full)
    if site.row_parallel:
        return scales
    rank = torch.distributed.get_rank(site.tp_group)
    mine = spec.rank_rows(dims, quantizer.tp_size, rank)
    return torch.cat([scales[rows.start : rows.stop] for rows in mine])
