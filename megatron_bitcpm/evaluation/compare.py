"""Finished runs side by side: validation losses, and a bigram model's on the same windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bitcpm.checkpoint.store import CONFIG_FILE, find_checkpoint, read_config, read_state
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.data.tokenizer import load_tokenizer
from megatron_bitcpm.errors import ConfigError, format_problem
from megatron_bitcpm.platforms import current_platform
from megatron_bitcpm.training.metrics import plot_losses


def compare_runs(runs: list[str], plot: Path | None = None) -> dict[str, Any]:
    """Return the final validation losses of runs over the same windows, and the bigram model's.

    Args:
        runs: ``label=folder`` strings; the first run's data is the reference.
        plot: PNG file to draw the losses into.

    Returns:
        {"validation_loss": {label: nats per token}, "learning_rate": {label: peak}, "bigram": ...}.

    Raises:
        ConfigError: the runs did not validate on the same windows.
    """
    folders = dict(_split(run) for run in runs)
    if len(folders) < len(runs):
        raise ConfigError(
            format_problem("run", " ".join(runs), "a label stands twice", "Name them differently")
        )
    checkpoints = {label: find_checkpoint(folder) for label, folder in folders.items()}
    configs = {label: read_config(folder) for label, folder in checkpoints.items()}
    first = next(iter(configs))
    for label, config in configs.items():
        if _windows(config) != _windows(configs[first]):
            raise ConfigError(
                format_problem(
                    label, checkpoints[label] / CONFIG_FILE,
                    f"validates on other windows than {first}",
                    "Compare runs with the same data, seq_length, eval_iters and global_batch_size",
                )
            )  # fmt: skip
    states = {label: read_state(folder) for label, folder in checkpoints.items()}
    for label, state in states.items():
        if state["valid_loss"] is None:
            raise ConfigError(
                format_problem(
                    label, checkpoints[label], "was saved without a validation",
                    "Train to the end, or set save_interval to a multiple of eval_interval",
                )
            )  # fmt: skip
    bigram = _bigram(configs[first])
    if plot is not None:
        plot_losses(folders, plot, {"bigram model": bigram})
    return {
        "validation_loss": {label: state["valid_loss"] for label, state in states.items()},
        "learning_rate": {label: config.optimizer.lr for label, config in configs.items()},
        "steps": {label: state["iteration"] for label, state in states.items()},
        "bigram": bigram,
    }


def _split(run: str) -> tuple[str, Path]:
    label, equals, folder = run.partition("=")
    if not equals:
        raise ConfigError(
            format_problem("run", run, "is not label=folder", "Write ternary=path/to/run")
        )
    return label, Path(folder)


def _windows(config: RunConfig) -> tuple[str, int, int]:
    training = config.training
    samples = training.eval_iters * training.global_batch_size
    return str(Path(config.data.prefix).resolve()), config.data.seq_length, samples


def _bigram(config: RunConfig) -> float:
    current_platform().prepare()
    from megatron_bitcpm.data.dataset import build_train_valid_datasets
    from megatron_bitcpm.evaluation.bigram import bigram_loss

    data, training = config.data, config.training
    tokenizer = load_tokenizer(data.tokenizer)
    samples = training.eval_iters * training.global_batch_size
    _, valid = build_train_valid_datasets(
        data.prefix,
        data.seq_length,
        train_samples=training.train_iters * training.global_batch_size,
        valid_samples=samples,
        seed=training.seed,
        tokenizer=tokenizer,
        cache_dir=data.cache,
    )
    windows = (valid[index] for index in range(samples))
    return bigram_loss(f"{data.prefix}_train", windows, tokenizer.vocab_size)
