"""How long a save holds training, at once and in the background.

    python tests/checkpoint/measure_stall.py [ranks]

One line for each of three saves of a model of 12 M parameters in bf16 with its optimizer, which is
about 170 MB; the first save of a process also imports and allocates.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.ranks import run_ranks


def measure(rank: int, directory: str, async_save: bool) -> tuple[float, float, list[str]]:
    """Return size in MB, seconds of a step without a save, and a line for each save."""
    import torch
    from checkpoint_cases import Schedule, build, run_config
    from helpers.tiny_models import tiny_model_config

    from megatron_bitcpm.checkpoint.saver import CheckpointSaver

    model = tiny_model_config(
        num_layers=4, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8
    )
    config = run_config(Path(directory), async_save=async_save, keep_last_n=1)
    lines = []
    with build({"dtype": torch.bfloat16, "model": model}) as run:
        saver = CheckpointSaver(config, torch.device("cpu"))
        run.train_step(0)
        start = time.perf_counter()
        for step in range(4):
            run.train_step(step)
        plain_s = (time.perf_counter() - start) / 4
        for iteration in range(1, 4):
            progress = {"iteration": iteration}
            facts = {**progress, "world_size": 1}
            reports = saver.save(run.chunks, run.optimizer, Schedule(), progress, facts)
            steps, start = 0, time.perf_counter()
            while not reports:
                run.train_step(iteration)
                steps += 1
                report = saver.poll()
                reports = [] if report is None else [report]
            step_s = (time.perf_counter() - start) / max(steps, 1)
            report = reports[-1]
            lines.append(
                f"stall {report.stall_s:.2f} s, writing {report.write_s:.2f} s"
                + (f", {steps} steps of {step_s:.2f} s meanwhile" if steps else "")
            )
    size = sum(path.stat().st_size for path in report.folder.iterdir())
    return size / 1e6, plain_s, lines


def main() -> None:
    """Print the table."""
    world = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for async_save in (False, True):
        with tempfile.TemporaryDirectory() as directory:
            size, plain_s, lines = run_ranks(world, measure, directory, async_save)[0]
        print(f"async_save {async_save}: {size:.0f} MB, a step {plain_s:.2f} s")
        for line in lines:
            print(f"  {line}")


if __name__ == "__main__":
    main()
