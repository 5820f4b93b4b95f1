"""The optimizer's part of a checkpoint, in a form that other layouts can load.

Per model parameter: the fp32 main parameter and both moments, cut like the parameter itself. The
stock optimizer does that by itself; the distributed optimizer is asked for it:

* 0.12: ``fully_sharded_model_space``, every rank writes its flat piece;
* 0.16: ``fully_reshardable``, the pieces are gathered first. Stock 0.16 saves padded buckets
  shifted, which `patching.core` corrects; here is the check that it did.
"""

from __future__ import annotations

from typing import Any

from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.parallel.optimizer_parts import (
    gather_model_params,
    leaf_optimizers,
    seed_adam_state,
)
from megatron_bitcpm.patching.core import megatron_patches
from megatron_bitcpm.patching.versions import megatron_version


def optimizer_sharded_state_dict(
    optimizer: Any, model_sharded_state_dict: dict[str, Any], is_loading: bool = False
) -> dict[str, Any]:
    """Return the optimizer's sharded state dict; give the loaded one to its `load_state_dict`.

    Collective. `model_sharded_state_dict` is made on the live parameters, of which a save calls
    `gather_model_params`; of several chunks it is a dict of theirs.
    """
    guard_padded_buckets(optimizer)
    if not is_loading:
        gather_model_params(optimizer)
    for leaf in leaf_optimizers(optimizer):
        seed_adam_state(leaf)
    keywords: dict[str, Any] = {}
    if megatron_version() >= (0, 13):
        keywords["metadata"] = {"distrib_optim_sharding_type": "fully_reshardable"}
    result: dict[str, Any] = optimizer.sharded_state_dict(
        model_sharded_state_dict, is_loading=is_loading, **keywords
    )
    return result


def guard_padded_buckets(optimizer: Any) -> None:
    """Refuse padded buckets where Megatron would save them shifted, without our patches."""
    if megatron_version() < (0, 13) or megatron_patches().is_applied:
        return
    for leaf in leaf_optimizers(optimizer):
        for buffer in getattr(leaf, "buffers", []):
            padded = [b.grad_data.numel() != b.numel_unpadded for b in buffer.buckets[:-1]]
            if any(padded):
                raise CheckpointError(
                    f"parallel.ddp_bucket_size={leaf.ddp_config.bucket_size}: {sum(padded)} "
                    "buckets end in padding, behind which this megatron-core saves the optimizer "
                    "shifted. Call Platform.prepare first, or use one bucket."
                )
