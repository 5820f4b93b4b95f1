"""Beginning a run with the weights of another: which settings the two must share."""

from __future__ import annotations

from pathlib import Path

from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.errors import ConfigError, format_problem

_MAY_DIFFER = {
    "init_method_std",  # there is nothing to initialise
    "make_vocab_size_divisible_by",  # the shape of the embedding is compared
    "max_position_embeddings",  # no weights depend on these two: a longer context is a next stage
    "rope_scaling",
    "kv_channels",  # compared as head_dim, its default resolved
}


def check_init_from(config: RunConfig, saved: RunConfig, folder: Path) -> None:
    """Refuse to begin with the weights of another architecture.

    Layout, precision, quantiser, data and optimizer may differ, and what the length of the context
    decides.

    Args:
        config: the new run.
        saved: that of the checkpoint.
        folder: the checkpoint, for the message.

    Raises:
        ConfigError: one line for each setting of the model section that differs.
    """
    names = [name for name in type(config.model).model_fields if name not in _MAY_DIFFER]
    problems = [
        format_problem(
            f"model.{name if name != 'head_dim' else 'kv_channels'}",
            getattr(config.model, name),
            f"checkpoint.init_from {folder} has {getattr(saved.model, name)}",
            "Use that value, or begin with another checkpoint",
        )
        for name in [*names, "head_dim"]
        if getattr(config.model, name) != getattr(saved.model, name)
    ]
    if problems:
        raise ConfigError(problems)
