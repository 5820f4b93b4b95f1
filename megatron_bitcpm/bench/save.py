"""How long a checkpoint holds the training: written at once, and in the background.

The model and its steps are those of `bench.train`, with the optimizer.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bitcpm.bench.timing import interleave, medians, ratios
from megatron_bitcpm.bench.train import bench_config, build_state, time_step, train_step
from megatron_bitcpm.config import ParallelConfig
from megatron_bitcpm.errors import ConfigError
from megatron_bitcpm.training.runtime import start_runtime


def bench_save(rounds: int = 5) -> dict[str, Any]:
    """Save in both ways by turns, `rounds` times after a first one that does not count.

    In the JSON, of medians, ``step_s`` is of a step without a save, or meanwhile; ``stall_s`` says
    how long training was held; ``write_s`` how long files were written.
    """
    if rounds < 2:
        raise ConfigError(f"--rounds={rounds}: gives no median. Use 2 or more.")
    with start_runtime(ParallelConfig(), seed=1) as runtime, tempfile.TemporaryDirectory() as root:
        state, iterations = build_state("every_step", runtime), itertools.count(1)
        train_step(state, runtime.device)

        def save(way: str) -> dict[str, Any]:
            return _save(state, runtime.device, Path(root) / way, next(iterations))

        step = partial(time_step, state, runtime.device)
        found: dict[str, list[Any]] = interleave(
            {"step": step, "sync": partial(save, "sync"), "async": partial(save, "async")}, rounds
        )
    keys = {"sync": ("stall_s", "write_s"), "async": ("stall_s", "write_s", "step_s")}
    saves = {way: {key: [value[key] for value in found[way]] for key in keys[way]} for way in keys}
    stall_ratios = ratios(saves["async"]["stall_s"], saves["sync"]["stall_s"])
    return {
        "megabytes": found["sync"][0]["megabytes"],
        "device": runtime.platform.name,
        "step_s": statistics.median(found["step"]),
        **{way: medians(values) for way, values in saves.items()},
        "stall_ratio": statistics.median(stall_ratios),
        "rounds": rounds,
    }


def _save(state: Any, device: Any, directory: Path, iteration: int) -> dict[str, Any]:
    """Save once into the folder named after the way; return what it took."""
    from megatron_bitcpm.checkpoint.saver import CheckpointSaver

    in_background = directory.name == "async"
    config = bench_config(
        "every_step", directory=str(directory), async_save=in_background, keep_last_n=1
    )
    saver = CheckpointSaver(config, device)
    progress = {"iteration": iteration}
    with state.ternary.latents() if state.ternary else nullcontext():
        reports = saver.save(
            state.chunks, state.optimizer, state.scheduler, progress, {**progress, "world_size": 1}
        )
    report, steps_s = next(iter(reports), None), []
    while report is None:
        steps_s.append(time_step(state, device))
        report = saver.poll()
    size = sum(path.stat().st_size for path in report.folder.iterdir())
    return {
        "megabytes": round(size / 1e6, 1),
        "stall_s": report.stall_s,
        "write_s": report.write_s,
        "step_s": statistics.median(steps_s) if steps_s else None,
    }
