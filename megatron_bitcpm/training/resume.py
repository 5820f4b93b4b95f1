"""How far a run has come, and which settings may change when it is resumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.errors import ConfigError

_MAY_CHANGE = (
    "model.rope_scaling.source",  # a note; the factors themselves are compared
    "quant.requantize",  # both modes compute the same
    "quant.backend",  # so do all backends
    "parallel.",  # checkpoints fit every layout, but for `_MUST_STAY`
    "data.prefix",  # files move; their contents are compared by `check_same_data`
    "data.blend",
    "data.valid",
    "data.tokenizer",
    "data.cache",
    "optimizer.",  # the schedule may be continued differently, for example a longer stable phase
    "training.train_iters",
    "training.eval_",
    "training.log_interval",
    "training.recompute",
    "training.micro_batch_size",  # the order of samples depends on global_batch_size only
    "training.exit_duration_in_mins",
    "guard.",
    "checkpoint.",
)

_MUST_STAY = (
    "parallel.use_distributed_optimizer",  # the two keep their state in different forms
)


@dataclass
class Progress:
    """Counters of a run and the state of `LossGuard`; saved in every checkpoint."""

    iteration: int = 0  # optimizer steps done, skipped ones included
    consumed_samples: int = 0  # position in the training data; ahead of steps after a rollback
    skipped_steps: int = 0  # without an update, because gradients were not finite
    guard: dict[str, Any] = field(default_factory=dict)


def check_resumable(config: RunConfig, saved: RunConfig, folder: Path) -> None:
    """Refuse to resume a checkpoint with settings under which it would not be the same run."""
    now, then = _flatten(config.model_dump()), _flatten(saved.model_dump())
    problems = [
        f"{key}={now.get(key, '(absent)')}: the checkpoint {folder.name} was trained with "
        f"{then.get(key, '(absent)')}. Use that value, or start a new run in another folder."
        for key in {**then, **now}
        if now.get(key) != then.get(key) and (key in _MUST_STAY or not key.startswith(_MAY_CHANGE))
    ]
    problems += _local_scale_problems(config, saved, folder)
    if problems:
        raise ConfigError(problems)


def _local_scale_problems(config: RunConfig, saved: RunConfig, folder: Path) -> list[str]:
    """With scales of shards another tensor-parallel size is another quantiser."""
    quant = saved.quant
    tp, saved_tp = (c.parallel.tensor_model_parallel_size for c in (config, saved))
    local = []
    if quant.scale_sync == "local":
        local.append("quant.scale_sync local")
    if quant.activation != "none":
        local.append(f"quant.activation {quant.activation}")
    if tp == saved_tp or not quant.enabled or not local:
        return []
    return [
        f"parallel.tensor_model_parallel_size={tp}: the checkpoint {folder.name} was trained with "
        f"{saved_tp} and {' and '.join(local)}, whose scales depend on it. Use {saved_tp}, or "
        "start a new run with init_from."
    ]


def check_same_data(
    config: RunConfig, facts: dict[str, str], saved: dict[str, Any], folder: Path
) -> None:
    """Refuse to continue a checkpoint's state with other training data than `facts` describe."""
    data = config.data
    train_data = f"data.prefix={data.prefix}_train"
    if data.blend:
        train_data = f"data.blend={[f'{entry.weight:g} {entry.prefix}' for entry in data.blend]}"
    fields = {"tokenizer_sha256": f"data.tokenizer={data.tokenizer}", "train_data": train_data}
    problems = [
        f"{name}: is not what the checkpoint {folder.name} was trained with. Use the same files "
        "and weights, or start a new run in another folder."
        for key, name in fields.items()
        if saved.get(key) != facts[key]
    ]
    if problems:
        raise ConfigError(problems)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
