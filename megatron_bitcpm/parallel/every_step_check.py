"""Whether quantising in place is safe with a given optimizer; asked once, when it is attached.

In place needs a separate main copy of every ternary weight from which Megatron rewrites the *whole*
model parameter. That is checked on the objects themselves: by storage, and by a probe that fills
the weights with NaN and asks for the rewrite.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_bitcpm.parallel.optimizer_parts import (
    leaf_optimizers,
    model_chunks,
    rewrite_model_params,
)
from megatron_bitcpm.parallel.site import TernarySite

# Options, by the object that carries them, under which the model parameter is something else than
# a rounded copy of a main parameter, or is rewritten by somebody else.
_REFUSED_OPTIMIZER = {
    "use_precision_aware_optimizer": "the model parameter may be half of the main parameter",
    "optimizer_cpu_offload": "the main parameters are kept on the host",
    "fp8_recipe": "the model parameter is not stored in bf16",
    "reuse_grad_buf_for_mxfp8_param_ag": "the model parameter is not stored in bf16",
}
_REFUSED_DDP = {
    "use_megatron_fsdp": "every forward gathers the weights again",
    "use_custom_fsdp": "every forward gathers the weights again",
    "fp8_param_gather": "the model parameter is not stored in bf16",
}
_REFUSED_MODEL = {
    "qk_clip": "it rewrites query and key weights after the step",
    "enable_cuda_graph": "Python does not run when a graph is replayed",
}


def reason_against_every_step(optimizer: Any, sites: list[TernarySite]) -> str | None:
    """Return why the ternary weights cannot be quantised in place, or None; they stay as before."""
    leaves = leaf_optimizers(optimizer)
    configs = [(leaf.config, _REFUSED_OPTIMIZER) for leaf in leaves]
    configs += [(chunk.ddp_config, _REFUSED_DDP) for chunk in model_chunks(optimizer)]
    configs += [(site.module.config, _REFUSED_MODEL) for site in sites[:1]]
    for config, refused in configs:
        for option, why in refused.items():
            if getattr(config, option, None):
                return f"{option} is set: {why}"
    overlap = "overlap_param_gather_with_optimizer_step"
    if len(leaves) > 1 and getattr(leaves[0].config, overlap, False):
        return f"{overlap} gathers experts before their own step"
    main_storages = {
        tensor.untyped_storage().data_ptr()
        for leaf in leaves
        if leaf.optimizer is not None
        for group in leaf.optimizer.param_groups
        for tensor in group["params"]
    }
    for site in sites:
        if not site.weight.requires_grad:
            return f"{site.name} is frozen: it has no main parameter"
        if site.weight.untyped_storage().data_ptr() in main_storages:
            return f"{site.name} has no separate main parameter ({site.weight.dtype})"
    return _probe(optimizer, sites)


@torch.no_grad()
def _probe(optimizer: Any, sites: list[TernarySite]) -> str | None:
    # The copies wait on the host: at this point device memory is what a user has least of.
    before = [site.weight.detach().to("cpu", copy=True) for site in sites]
    for site in sites:
        site.weight.data.fill_(float("nan"))
    rewrite_model_params(optimizer)
    lost = []
    for site, latent_OI in zip(sites, before, strict=True):
        if not torch.equal(site.weight.detach().to("cpu"), latent_OI):
            lost.append(site.name)
            site.weight.data.copy_(latent_OI)
    if lost:
        return f"this optimizer did not rewrite {len(lost)} of {len(sites)} ternary weights"
    return None
