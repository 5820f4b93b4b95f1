"""Runs of the command on several ranks, and what they leave behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

from helpers.model_factory import tiny_fields
from helpers.ranks import CONTEXT, run_one_rank, run_ranks
from megatron_bitcpm.cli import main

# Numbers that depend on the machine.
CLOCK = ("tokens_per_s", "tflops_per_device", "memory_gb", "save_stall_s")
TRACKER = "latest_checkpointed_iteration.txt"


def tiny_config(corpus, directory, **overrides) -> dict:
    """The YAML tree of a tiny run; overrides are ``section__key=value``."""
    tree = {
        "model": tiny_fields("run"),
        "quant": {"requantize": "every_step"},
        "parallel": {"tensor_model_parallel_size": 1},
        "data": {
            "prefix": str(corpus / "data" / "text"),
            "tokenizer": str(corpus / "tokenizer"),
            "seq_length": 32,
        },
        "optimizer": {"lr": 5e-3, "lr_warmup_iters": 2},
        "training": {
            "train_iters": 8,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "eval_interval": 4,
            "eval_iters": 1,
            "log_interval": 1,
        },
        "checkpoint": {"directory": str(directory), "save_interval": 4},
    }
    for path, value in overrides.items():
        section, key = path.split("__", 1)
        tree.setdefault(section, {})[key] = value
    return tree


def call_cli(rank: int, arguments: list[str]) -> tuple[int, str]:
    """Run the command in this rank; return (exit code, what it printed to stderr)."""
    stream, sys.stderr = sys.stderr, io.StringIO()
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0), sys.stderr.getvalue()
    finally:
        text, sys.stderr = sys.stderr.getvalue(), stream
    return 0, text


def train(world: int, config, *extra: str) -> list[tuple[int, str]]:
    return run_ranks(world, call_cli, ["train", "--config", str(config), *extra])


def train_well(world: int, config, *extra: str) -> list[str]:
    """Train on every rank without an error; return what the ranks printed."""
    results = train(world, config, *extra)
    for code, message in results:
        assert code == 0, message
    return [message for _, message in results]


def metrics(folder) -> list[dict]:
    """Every line, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def numbers(folder, key: str) -> dict[int, float]:
    """One metric by step."""
    return {m["iteration"]: m[key] for m in metrics(folder) if key in m}


def tensors(checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimizer included."""
    reader = FileSystemReader(str(checkpoint))
    found = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if hasattr(entry, "size"):
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    torch.distributed.checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


def keep_only(source, target, iteration: int) -> None:
    """Copy a run as it was right after the checkpoint of an iteration."""
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, target / name)
    (target / TRACKER).write_text(str(iteration))
    shutil.copy(source / "metrics.jsonl", target / "metrics.jsonl")


def disturb(
    world: int,
    arguments: list[str],
    moment: Callable[[], bool],
    number: signal.Signals,
    ranks: Collection[int] | None = None,
) -> list[int | None]:
    """Start a command on several ranks and send them a signal at some moment.

    Args:
        world: ranks.
        arguments: of the `bitcpm` command.
        moment: asked again and again; the signal is sent when it returns True.
        number: SIGKILL goes to every process of a rank, others to the rank itself.
        ranks: which get it; all if not given.

    Returns:
        The ranks' exit codes, negative for a signal.
    """
    results = CONTEXT.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [
            CONTEXT.Process(
                target=run_one_rank, args=(rank, world, store, results, _exit_as_cli, (arguments,))
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        while not moment() and any(p.is_alive() for p in processes):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for rank, process in enumerate(processes):
            if process.is_alive() and (ranks is None or rank in ranks):
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:
                    os.kill(process.pid, number)
        for process in processes:
            process.join(timeout=100)
        return [process.exitcode for process in processes]


def _exit_as_cli(rank: int, arguments: list[str]) -> None:
    code, _ = call_cli(rank, arguments)
    if code:
        os._exit(code)


def tracked(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    path = folder / TRACKER
    return int(path.read_text()) if path.is_file() else 0
