"""Functions that run on the ranks of checkpoint tests, and small checkpoints without ranks."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import save

from helpers.model_factory import tiny_fields, tiny_model
from helpers.tiny_models import tiny_run
from megatron_bitcpm.config import QuantConfig, RunConfig, parse_config
from megatron_bitcpm.errors import BitcpmError

CONFIG = {
    "model": tiny_fields(num_layers=4),
    "parallel": {"tensor_model_parallel_size": 1},
    "data": {"prefix": "d", "tokenizer": "t", "seq_length": 16},
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 10, "micro_batch_size": 1, "global_batch_size": 4},
    "checkpoint": {"directory": "run"},
}


def run_config(directory: Path, **checkpoint: Any) -> RunConfig:
    """A configuration whose checkpoint section is `checkpoint`."""
    settings = {"directory": str(directory), "save_interval": 1, **checkpoint}
    return parse_config(yaml.safe_dump({**CONFIG, "checkpoint": settings}), world_size=1)


def write_files(folder: Path) -> None:
    """Fill a folder with what Megatron's part of a checkpoint looks like; written by torch."""
    save({"w": torch.arange(6.0)}, checkpoint_id=str(folder), no_dist=True)
    torch.save({"progress": {}}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))


class Schedule:
    """Stands for the learning-rate schedule."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def build(layout: dict[str, Any], **changes: Any) -> Any:
    """A tiny fp32 run at a layout; the global batch is the same for all."""
    settings = {
        "quant": None,
        "dtype": torch.float32,
        "model": tiny_model(num_layers=4),
        **layout,
        **changes,
    }
    ranks = settings.get("tp", 1) * settings.get("pp", 1)
    dp = torch.distributed.get_world_size() // ranks
    return tiny_run(settings.pop("quant"), micro_batches=4 // dp, **settings)


def save_state(folder: Path, run: Any, schedule: Schedule) -> None:
    """Write Megatron's part of a checkpoint of step 2, at once."""
    from megatron_bitcpm.checkpoint.state import begin_save

    planned = begin_save(folder, run.chunks, run.optimizer, schedule, {"iteration": 2})
    planned.write()
    planned.commit()


def train_and_save(rank: int, folder: str, layout: dict[str, Any]) -> list[Any]:
    """Two steps, a save, two steps; return the latter."""
    if rank == 0:
        os.mkdir(folder)
    torch.distributed.barrier()
    with build(layout) as run:
        for step in (0, 1):
            run.train_step(step)
        save_state(Path(folder), run, Schedule(2))
        return [run.train_step(step) for step in (2, 3)]


def load_and_train(rank: int, folder: str, layout: dict[str, Any]) -> list[Any]:
    """Load into a run of another seed and do the steps that follow."""
    from megatron_bitcpm.checkpoint.state import load_state

    with build({"seed": 99, **layout}) as run:
        schedule = Schedule()
        progress = load_state(Path(folder), run.chunks, run.optimizer, schedule)
        assert (progress, schedule.steps) == ({"iteration": 2}, 2)
        return [run.train_step(step) for step in (2, 3)]


def refused_load(rank: int, folder: str, layout: dict[str, Any]) -> str:
    """Return the message with which a load fails."""
    from megatron_bitcpm.checkpoint.state import load_state

    with build(layout) as run:
        try:
            load_state(Path(folder), run.chunks, run.optimizer, Schedule())
        except BitcpmError as error:
            return str(error)
    return "loaded"


def load_weights_of(rank: int, folder: str, layout: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the error of `load_weights` or '', and the embedding as this rank then has it."""
    from megatron_bitcpm.checkpoint.state import load_weights

    with build({"seed": 99, **layout}) as run:
        try:
            load_weights(Path(folder), run.chunks)
        except BitcpmError as error:
            return str(error), {}
        run.optimizer.reload_model_params()
        weights = {
            name: value.detach().float().numpy()
            for chunk in run.chunks
            for name, value in chunk.named_parameters()
        }
        loss = run.forward_backward(0, forward_only=True)
        return "", {"loss": loss, "weights": weights}


def loss_of(rank: int, folder: str, layout: dict[str, Any]) -> float:
    """Loss of the state in a checkpoint, restored in full."""
    from megatron_bitcpm.checkpoint.state import load_state

    with build(layout) as run:
        load_state(Path(folder), run.chunks, run.optimizer, Schedule())
        return run.forward_backward(0, forward_only=True)


TERNARY = QuantConfig(group_size=32, requantize="every_forward")


class Payload:
    """A pickle that makes a file when it is loaded without restriction."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


def make_malicious(folder: Path, place: str, victim: Path) -> None:
    """Put a payload into one of the pickles of a checkpoint."""
    if place == "common.pt":
        content = torch.load(folder / place, weights_only=False)
        torch.save({**content, "progress": Payload(victim)}, folder / place)
        return
    index = pickle.loads((folder / ".metadata").read_bytes())
    if place == ".metadata":
        index.storage_meta = Payload(victim)
    else:
        # A random state that lies behind everything else in its file.
        key = next(k for k in index.storage_data if k.fqn.startswith("rng_state/"))
        info = index.storage_data[key]
        with (folder / info.relative_path).open("ab") as file:
            info.offset = file.tell()
            torch.save([Payload(victim)], file)
            info.length = file.tell() - info.offset
    (folder / ".metadata").write_bytes(pickle.dumps(index))
