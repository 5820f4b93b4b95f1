"""What a training checkpoint holds, and how it comes back at any layout.

In Megatron's torch_dist format: latent weights, optimizer (fp32 main parameters and moments),
schedule, every rank's random state, position in the data. Weights and optimizer are stored by their
place in the full model, so that any other tensor-, pipeline-, data- or context-parallel size finds
its part; random states only fit the layout that wrote them.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.tensor_parallel import random as device_random
from torch.distributed.checkpoint.metadata import Metadata

from megatron_bitcpm.checkpoint.safe_load import (
    find_damage,
    load_common,
    load_sharded,
    read_metadata,
)
from megatron_bitcpm.checkpoint.writer import PlannedSave, plan_save
from megatron_bitcpm.errors import refusal
from megatron_bitcpm.parallel.agree import on_all_ranks
from megatron_bitcpm.parallel.megatron_api import sharded_state_dict_of_chunks
from megatron_bitcpm.parallel.optimizer_state import optimizer_sharded_state_dict

logger = logging.getLogger(__name__)

_GROUP_SETTINGS = ("betas", "eps", "max_lr", "min_lr", "wd_mult")


def begin_save(
    folder: Path, chunks: Sequence[Any], optimizer: Any, scheduler: Any, progress: dict[str, Any]
) -> PlannedSave:
    """Plan Megatron's part of a checkpoint on the live tensors; collective over all ranks.

    The caller then runs `PlannedSave.write` on every rank, before training continues or after
    `PlannedSave.copy_tensors` in any thread, and `PlannedSave.commit` on all. `folder` is empty and
    seen by every rank; `chunks`, wrapped or not, hold latent weights; `progress` are plain numbers
    that resume needs (iteration, consumed samples).
    """
    return plan_save(folder, _full_state(chunks, optimizer, scheduler, progress))


def load_state(
    folder: Path, chunks: Sequence[Any], optimizer: Any, scheduler: Any, seed: int = 0
) -> dict[str, Any]:
    """Restore what `begin_save` took, at any layout, and return the progress; collective.

    `seed`, the run's, seeds the random states where the layout is another. Every rank refuses what
    is damaged, unsafe, or of another model or kind of optimizer.
    """
    metadata = _check_files(folder)
    state = _full_state(chunks, optimizer, scheduler, {}, is_loading=True)
    same_layout = _first_random_state() in metadata.state_dict_metadata
    if not same_layout:
        del state["rng_state"]
    _check_entries(folder, state, metadata)
    loaded = load_sharded(state, folder)
    _load_models(chunks, loaded)
    _load_optimizer(optimizer, loaded["optimizer"])
    # Megatron adds the saved steps to those done: a rollback would count them twice.
    scheduler.num_steps = 0
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    progress = dict(loaded["progress"])
    if same_layout:
        _restore_random_state(loaded["rng_state"])
    else:
        _seed_random_state(seed + progress.get("iteration", 0))
        logger.info("%s was written at another layout: random states are seeded anew", folder.name)
    return progress


def load_weights(folder: Path, chunks: Sequence[Any]) -> None:
    """Take only the model's tensors from a checkpoint of any layout and type; collective.

    Values are cast. Call the optimizer's `reload_model_params` afterwards: it has copies.
    """
    metadata = _check_files(folder)
    state = _model_state(chunks)
    _check_entries(folder, state, metadata)
    _load_models(chunks, load_sharded(state, folder))


def _unwrap(chunk: Any) -> Any:
    """Return the model inside DistributedDataParallel and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    return sharded_state_dict_of_chunks([_unwrap(chunk) for chunk in chunks])


def _full_state(
    chunks: Sequence[Any],
    optimizer: Any,
    scheduler: Any,
    progress: dict[str, Any],
    is_loading: bool = False,
) -> dict[str, Any]:
    models = _model_state(chunks)
    return {
        **models,
        "opt_param_scheduler": scheduler.state_dict(),
        "rng_state": _sharded_random_state(),
        "progress": dict(progress),
        "optimizer": optimizer_sharded_state_dict(optimizer, models, is_loading=is_loading),
    }


def _load_models(chunks: Sequence[Any], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        _unwrap(chunk).load_state_dict(loaded[f"model{index}"])


def _load_optimizer(optimizer: Any, loaded: Any) -> None:
    # Megatron restores the hyperparameters with the moments; this run's configuration decides them.
    settings = [
        {key: group[key] for key in _GROUP_SETTINGS if key in group}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(loaded)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": device_random.get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    device_random.get_cuda_rng_tracker().set_states(state["tracker"])


def _seed_random_state(seed: int) -> None:
    seed %= 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    device_random.model_parallel_cuda_manual_seed(seed)


def _layout() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the (pipeline, tensor, data x context) sizes and this rank's place in them."""
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return sizes, place


def _sharded_random_state() -> ShardedObject:
    sizes, place = _layout()
    # Every rank its own entry: data-parallel ranks may differ too.
    return ShardedObject("rng_state", _random_state(), sizes, place, replica_id=0)


def _first_random_state() -> str:
    """Return the name of the first rank's entry in a checkpoint of this layout."""
    key: str = ShardedObject("rng_state", None, _layout()[0], (0, 0, 0)).unique_key
    return key


def _check_files(folder: Path) -> Metadata:
    """Return a checkpoint's index after a first look at all its files; collective."""

    def check() -> Metadata:
        metadata = read_metadata(folder)
        if damage := find_damage(folder):
            raise refusal(folder, f"is incomplete: {damage}", "Use another checkpoint")
        load_common(folder)
        return metadata

    metadata = on_all_ranks(
        check, lambda reason: refusal(folder, f"cannot be read: {reason}", "Name another folder")
    )
    assert metadata is not None
    return metadata


def _check_entries(folder: Path, state: dict[str, Any], metadata: Metadata) -> None:
    """Refuse a checkpoint of another model or optimizer, naming the first tensor; collective."""

    def check() -> None:
        wanted = {tensor.key: tensor for tensor in _tensors(state)}
        # The model comes first: where it fits, a state that does not is another optimizer's.
        for key, tensor in wanted.items():
            kind = "optimizer" if key.startswith("optimizer.") else "model"
            if key not in metadata.state_dict_metadata:
                raise refusal(folder, f"has no tensor {key}", _FIXES[kind])
            found, shape = _stored_shape(metadata, tensor), list(tensor.global_shape)
            if found is None:
                raise refusal(folder, f"{key} is stored in another form", _FIXES[kind])
            if found != shape:
                raise refusal(
                    folder, f"{key} has shape {found}, the {kind}'s has {shape}", _FIXES[kind]
                )
        kinds = {_optimizer_part(key) for key in wanted}
        for key in metadata.state_dict_metadata if len(kinds) > 1 else ():
            if _optimizer_part(key) not in kinds:
                raise refusal(folder, f"has {key} of another optimizer", _FIXES["optimizer"])

    on_all_ranks(check, lambda reason: refusal(folder, reason, "Use another checkpoint"))


_FIXES = {
    "model": "Use the model section of its bitcpm_config.yaml or bitcpm_model.json",
    "optimizer": "Use the precision and use_distributed_optimizer of its bitcpm_config.yaml, and "
    "with the latter the megatron-core that wrote it",
}


def _optimizer_part(key: str) -> str | None:
    """Return what of the optimizer a tensor is (``exp_avg``, ...), None for other tensors."""
    match = re.match(r"optimizer\.state\.(\w+)\.", key)
    return match[1] if match else None


def _stored_shape(metadata: Metadata, tensor: ShardedTensor) -> list[int] | None:
    """Return the full shape of a tensor in a checkpoint, None where it is of another kind."""
    if getattr(tensor, "flattened_range", None) is None:
        entry: Any = metadata.state_dict_metadata[tensor.key]
        return list(entry.size)
    # 0.12 stores the flat pieces of the distributed optimizer in a form of their own.
    facts = getattr(metadata, "mcore_data", {}).get(tensor.key, {})
    shape = facts.get("nd_reformulated_orig_global_shape")
    return None if shape is None else list(shape)


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        yield from (part for part in parts if isinstance(part, ShardedTensor))
