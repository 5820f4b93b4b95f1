"""Which settings may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.errors import ConfigError, format_problem

_MAY_CHANGE = (
    "quant.requantize",  # both modes compute the same
    "quant.backend",  # so do all backends
    "data.prefix",  # files move; their contents are compared by `check_same_data`
    "data.tokenizer",
    "data.cache",
    "optimizer.",  # the schedule may be continued differently, for example a longer stable phase
    "training.train_iters",
    "training.eval_",
    "training.log_interval",
    "training.recompute",
    "training.exit_duration_in_mins",
    "guard.",
    "checkpoint.",
)


def check_resumable(config: RunConfig, saved: RunConfig, folder: Path) -> None:
    """Refuse to resume with settings under which it would not be the same run.

    Args:
        config: what the user asks for now.
        saved: the checkpoint's configuration.
        folder: the checkpoint, for the message.

    Raises:
        ConfigError: one line for each setting that differs.
    """
    now, then = _flatten(config.model_dump()), _flatten(saved.model_dump())
    problems = [
        format_problem(
            key,
            now[key],
            f"the checkpoint {folder.name} was trained with {then[key]}",
            "Use that value, or start a new run in another folder",
        )
        for key in now
        if now[key] != then[key] and not key.startswith(_MAY_CHANGE)
    ]
    if problems:
        raise ConfigError(problems)


def check_same_data(
    config: RunConfig, facts: dict[str, str], saved: dict[str, Any], folder: Path
) -> None:
    """Refuse to continue in the middle of other data.

    Args:
        config: for the names of the files.
        facts: fingerprints of what is there now, see the trainer.
        saved: the checkpoint's state, which holds those of the training.
        folder: the checkpoint, for the message.

    Raises:
        ConfigError: one line for each difference.
    """
    fields = {
        "tokenizer_sha256": ("data.tokenizer", config.data.tokenizer),
        "train_data": ("data.prefix", f"{config.data.prefix}_train"),
        "valid_data": ("data.prefix", f"{config.data.prefix}_valid"),
    }
    problems = [
        format_problem(
            *fields[key],
            f"is not what the checkpoint {folder.name} was trained with",
            "Use the same files, or start a new run in another folder",
        )
        for key, value in facts.items()
        if saved.get(key) != value
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
