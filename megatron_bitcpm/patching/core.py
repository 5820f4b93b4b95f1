"""What stock megatron-core lacks on any device, release by release; applied by `Platform.prepare`.

Two reasons: 0.12 is older than the torch and numpy that it runs with here, and without Apex and
Transformer Engine, which exist for CUDA only, the inner optimizer is torch's, whose per-parameter
`step` Megatron's distributed optimizer does not expect when it loads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_bitcpm.patching.patch import Patch, PatchSet


def _nothing_to_quantise(original: Callable[..., Any]) -> Callable[..., Any]:
    """`quantize_param_shard` that does not ask for Transformer Engine without an fp8 parameter."""

    @functools.wraps(original)
    def wrapper(model_params: list[Any], *args: Any, **kwargs: Any) -> Any:
        return original(model_params, *args, **kwargs) if model_params else None

    return wrapper


def _with_torch_format(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch's `_write_item`, whose newer form must be told the format that used to be the only."""
    if "serialization_format" not in inspect.signature(original).parameters:
        return original
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    return functools.partial(original, serialization_format=SerializationFormat.TORCH_SAVE)


def _keep_own_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_set_main_param_and_optimizer_states` for torch's Adam.

    It copies a loaded tensor into every state of a parameter, also into `step`, which is not among
    the loaded tensors: the step travels with the parameter groups and is in place by then.
    """

    @functools.wraps(original)
    def wrapper(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        if "step" not in tensors:
            step = self._get_main_param_and_optimizer_states(model_param).get("step")
            if isinstance(step, torch.Tensor):
                tensors = {**tensors, "step": step.clone()}
        original(self, model_param, tensors)

    return wrapper


def _cut_at_unpadded_offsets(original: Callable[..., Any]) -> Callable[..., Any]:
    """`sharded_param_state_fully_reshardable` that cuts the gathered states where they begin.

    The gathered tensor of a buffer has no padding at the ends of its buckets, but Megatron cuts it
    at the offsets of the padded buffer: behind the first padded bucket every main parameter and
    moment is saved shifted. Later releases subtract the padding of all earlier buckets; so does
    this, in the offsets that the method reads.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _unpadded_index_map(buffer)
            return original(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map

    return wrapper


def _unpadded_index_map(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    removed, padding_before = 0, []
    for bucket in buffer.buckets:
        padding_before.append(removed)
        removed += bucket.grad_data.numel() - bucket.numel_unpadded
    return {
        param: (start - padding_before[bucket_id], end - padding_before[bucket_id], bucket_id)
        for param, (start, end, bucket_id) in buffer.param_index_map.items()
    }


def _align_param_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_get_param_groups` with the same groups in the same order on every rank.

    A checkpoint holds rank 0's groups and a load pairs them by position, but 0.12 orders groups by
    the first parameter of each, which differs between pipeline stages: matrices and vectors would
    exchange their weight decay, and a stage that lacks a group could not load at all.
    """
    keys = ("is_expert_parallel", "wd_mult", "lr_mult", "is_decoupled_lr")

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        groups = {tuple(group[key] for key in keys): group for group in original(*args, **kwargs)}
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        mine = [{**group, "params": []} for group in groups.values()]
        torch.distributed.all_gather_object(everyone, mine)
        for group in (group for theirs in everyone for group in theirs):
            groups.setdefault(tuple(group[key] for key in keys), group)
        return [groups[key] for key in sorted(groups, key=lambda k: (k[0], -k[1], k[2:]))]

    return wrapper


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"

_core = functools.partial(Patch, package="megatron-core")
_core_0_12 = functools.partial(_core, versions=((0, 12),), exit="0.12 is no longer supported")

CATALOGUE = [
    _core_0_12("numpy:product", lambda _: np.prod, "gone in numpy 2", instead_of_absent=True),
    _core_0_12(
        f"{_OPTIMIZER}:quantize_param_shard",
        _nothing_to_quantise,
        "raises without Transformer Engine also when no parameter is fp8",
    ),
    _core_0_12(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:_write_item",
        _with_torch_format,
        "torch 2.7 and later want the serialization format",
    ),
    _core_0_12(
        "megatron.core.optimizer:_get_param_groups",
        _align_param_groups,
        "parameter groups differ between pipeline stages",
    ),
    _core(
        f"{_OPTIMIZER}:DistributedOptimizer._set_main_param_and_optimizer_states",
        _keep_own_step,
        "torch's Adam keeps a step per parameter",
        "Megatron loads only the states that a checkpoint holds",
    ),
    _core(
        f"{_OPTIMIZER}:DistributedOptimizer.sharded_param_state_fully_reshardable",
        _cut_at_unpadded_offsets,
        "saves padded buckets shifted",
        "0.16 is no longer supported",
        versions=((0, 16),),
    ),
]
"""Every replacement in Megatron that does not depend on the device."""


@functools.cache
def megatron_patches() -> PatchSet:
    """Return the process's one set of those that are needed here (none is applied yet)."""
    return PatchSet("megatron-core", CATALOGUE)
