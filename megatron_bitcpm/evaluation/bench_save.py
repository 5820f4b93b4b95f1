"""How long a checkpoint holds the training: written at once, and in the background.

One process, one rank, two layers of the 0.5B shapes with their optimizer. The two ways take turns,
so that a drift of the machine cancels.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megatron_bitcpm.config import ParallelConfig, RunConfig
from megatron_bitcpm.errors import ConfigError
from megatron_bitcpm.evaluation.bench_train import VOCAB_SIZE, bench_config, train_step
from megatron_bitcpm.training.runtime import start_runtime

_WAYS = ("sync", "async")


def bench_save(rounds: int = 5) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        rounds: saves in each of the two ways, after a first one that is not counted.

    Returns:
        Medians over the rounds: ``step_s`` of a step without a save; for each way ``stall_s`` that
        training was held and ``write_s`` that files were written; for the background also
        ``step_s`` of the steps meanwhile. ``stall_ratio`` is async / sync, the median of pairs.
    """
    if rounds < 2:
        raise ConfigError(f"--rounds={rounds}: gives no median. Use 2 or more.")
    with start_runtime(ParallelConfig(), seed=1) as runtime, tempfile.TemporaryDirectory() as root:
        from megatron_bitcpm.training.setup import build_train_state

        state = build_train_state(bench_config("every_step"), runtime, VOCAB_SIZE)
        train_step(state, runtime.device)
        steps_s: list[float] = []
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
        for index in range(1, rounds + 2):
            steps_s.append(_timed_step(state, runtime.device))
            for way in _WAYS:
                found[way].append(_save(state, runtime.device, Path(root) / way, index))
    kept = {way: values[1:] for way, values in found.items()}
    pairs = zip(kept["async"], kept["sync"], strict=True)
    return {
        "megabytes": kept["sync"][0]["megabytes"],
        "device": runtime.platform.name,
        "step_s": statistics.median(steps_s[1:]),
        **{
            way: {
                key: statistics.median(value[key] for value in values)
                for key in ("stall_s", "write_s", *(["step_s"] if way == "async" else []))
            }
            for way, values in kept.items()
        },
        "stall_ratio": statistics.median(a["stall_s"] / s["stall_s"] for a, s in pairs),
        "rounds": rounds,
    }


def _timed_step(state: Any, device: Any) -> float:
    start = time.perf_counter()
    train_step(state, device)
    return time.perf_counter() - start


def _save(state: Any, device: Any, directory: Path, iteration: int) -> dict[str, Any]:
    """Save once into the folder named after the way; return what it took."""
    from megatron_bitcpm.checkpoint.saver import CheckpointSaver

    saver = CheckpointSaver(_config(directory, directory.name == "async"), device)
    progress = {"iteration": iteration}
    with state.ternary.latents() if state.ternary else nullcontext():
        reports = saver.save(
            state.chunks, state.optimizer, state.scheduler, progress, {**progress, "world_size": 1}
        )
    steps_s = []
    while not reports:
        steps_s.append(_timed_step(state, device))
        reports = [report for report in [saver.poll()] if report is not None]
    report = reports[0]
    size = sum(path.stat().st_size for path in report.folder.iterdir())
    return {
        "megabytes": round(size / 1e6, 1),
        "stall_s": report.stall_s,
        "write_s": report.write_s,
        "step_s": statistics.median(steps_s) if steps_s else None,
    }


def _config(directory: Path, async_save: bool) -> RunConfig:
    config = bench_config("every_step")
    update = {"directory": str(directory), "async_save": async_save, "keep_last_n": 1}
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=update)})
