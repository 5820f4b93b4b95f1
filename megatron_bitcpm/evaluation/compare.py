"""Finished runs side by side: validation losses, and a bigram model's on the same windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bitcpm.checkpoint.store import CONFIG_FILE, find_checkpoint, read_config, read_state
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.data.tokenizer import load_tokenizer
from megatron_bitcpm.errors import ConfigError
from megatron_bitcpm.platforms import current_platform
from megatron_bitcpm.training.metrics import plot_losses


def compare_runs(runs: list[str], plot: Path | None = None) -> dict[str, Any]:
    """Compare runs, ``label=folder`` each, that validate on the first one's windows.

    Returns label -> number as validation_loss (nats per token), learning_rate (peak) and steps;
    and bigram, the bigram model's loss. The losses are drawn into `plot`, a PNG file.
    """
    folders: dict[str, Path] = {}
    for run in runs:
        label, equals, folder = run.partition("=")
        if not equals:
            raise ConfigError(f"run={run}: is not label=folder. Write ternary=path/to/run.")
        folders[label] = Path(folder)
    if len(folders) < len(runs):
        raise ConfigError(f"run={' '.join(runs)}: a label stands twice. Name them differently.")
    checkpoints = {label: find_checkpoint(folder) for label, folder in folders.items()}
    configs = {label: read_config(folder) for label, folder in checkpoints.items()}
    first = next(iter(configs))
    states = {label: read_state(folder) for label, folder in checkpoints.items()}
    windows = {label: _windows(configs[label], states[label]) for label in configs}
    for label, state in states.items():
        if windows[label] != windows[first]:
            raise ConfigError(
                f"{label}={checkpoints[label] / CONFIG_FILE}: validates on other windows than "
                f"{first}. Compare runs with the same data, seq_length, eval_iters and "
                "global_batch_size."
            )
        if state["valid_loss"] is None:
            raise ConfigError(
                f"{label}={checkpoints[label]}: was saved without a validation. Train to the "
                "end, or set save_interval to a multiple of eval_interval."
            )
    bigram = _bigram(configs[first])
    if plot is not None:
        plot_losses(folders, plot, {"bigram model": bigram} if bigram is not None else {})
    return {
        "validation_loss": {label: state["valid_loss"] for label, state in states.items()},
        "learning_rate": {label: config.optimizer.lr for label, config in configs.items()},
        "steps": {label: state["iteration"] for label, state in states.items()},
        "bigram": bigram,
    }


def _windows(config: RunConfig, state: dict[str, Any]) -> tuple[Any, ...]:
    """All that decides on which windows a run validated, and what counts in them."""
    training, data = config.training, config.data
    sets = {key: value for key, value in state.items() if key.startswith("valid_data.")}
    options = data.reset_attention_mask, data.reset_position_ids, data.eod_mask_loss
    return sets, data.seq_length, training.eval_iters * training.global_batch_size, options


def _bigram(config: RunConfig) -> float | None:
    """Loss of the bigram model of the training set; None for a blend, which has no one such."""
    if config.data.blend:
        return None
    current_platform().prepare()
    from megatron_bitcpm.data.dataset import build_valid_datasets
    from megatron_bitcpm.evaluation.bigram import bigram_loss

    data, training = config.data, config.training
    tokenizer = load_tokenizer(data.tokenizer)
    samples = training.eval_iters * training.global_batch_size
    losses = []
    for valid in build_valid_datasets(data, samples, tokenizer).values():
        windows = map(valid.__getitem__, range(samples))
        losses.append(bigram_loss(f"{data.prefix}_train", windows, tokenizer.vocab_size))
    return sum(losses) / len(losses)
