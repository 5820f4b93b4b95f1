"""What a training checkpoint holds, and how it comes back.

Saved with `megatron.core.dist_checkpointing`: the latent weights, the optimizer (fp32 main
parameters and moments), the schedule, every rank's random state, and the data position.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bitcpm.errors import CheckpointError

_GROUP_SETTINGS = ("betas", "eps", "max_lr", "min_lr", "wd_mult")


def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _sharded_random_state() -> ShardedObject:
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    dp = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    # Every rank its own entry: data-parallel ranks may differ too.
    return ShardedObject("rng_state", _random_state(), (pp, tp, dp), place, replica_id=0)


def _sharded_state(
    model: Any, optimizer: Any, scheduler: Any, progress: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    model_state = model.sharded_state_dict(
        metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    )
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=is_loading),
        "opt_param_scheduler": scheduler.state_dict(),
        "rng_state": _sharded_random_state(),
        "progress": progress,
    }


def _last_words(error: BaseException) -> str:
    """Return the end of an error's message on one line; torch puts the cause last."""
    return " ".join(str(error).split())[-300:].rstrip(".") or type(error).__name__


def save_state(
    folder: Path, model: Any, optimizer: Any, scheduler: Any, progress: dict[str, Any]
) -> None:
    """Write Megatron's part of a checkpoint; collective over all ranks.

    Args:
        folder: an empty folder that every rank sees.
        model: the GPTModel, holding latent weights.
        optimizer: Megatron's optimizer.
        scheduler: OptimizerParamScheduler.
        progress: plain numbers that resume needs (iteration, consumed samples).
    """
    state = _sharded_state(model, optimizer, scheduler, progress, is_loading=False)
    try:
        dist_checkpointing.save(state, str(folder))
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError.of(
            "checkpoint.directory", folder.parent, f"cannot be written: {_last_words(error)}",
            "Free space or name another folder; earlier checkpoints are as they were",
        ) from error  # fmt: skip


def load_state(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Restore everything `save_state` wrote; collective over all ranks.

    Returns:
        The `progress` that was saved.

    Raises:
        CheckpointError: the files are damaged, or belong to another model or layout.
    """
    state = _sharded_state(model, optimizer, scheduler, {}, is_loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except (Exception, CheckpointException) as error:
        # Damaged files fail inside torch's, zip's or pickle's code with whatever these raise; torch
        # collects the failures of all ranks in a BaseException of its own.
        raise CheckpointError.of(
            "checkpoint", folder, f"cannot be loaded: {_last_words(error)}",
            "Use the configuration in the folder's bitcpm_config.yaml and the same layout",
        ) from error  # fmt: skip
    model.load_state_dict(loaded["model"])
    # Megatron restores the hyperparameters with the moments; this run's configuration decides them.
    settings = [
        {key: group[key] for key in _GROUP_SETTINGS if key in group}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(loaded["optimizer"])
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    _restore_random_state(loaded["rng_state"])
    return dict(loaded["progress"])
