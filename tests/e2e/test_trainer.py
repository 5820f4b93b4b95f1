"""Whole runs of the trainer: learning, resuming bit for bit, stopping cleanly."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from helpers.ranks import run_ranks
from torch.distributed.checkpoint import FileSystemReader

from megatron_bitcpm.cli import main


def call_cli(rank: int, arguments: list[str]) -> tuple[int, str]:
    """Run the command in this rank; return (exit code, what it printed to stderr)."""
    stream, sys.stderr = sys.stderr, io.StringIO()
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0), sys.stderr.getvalue()
    finally:
        sys.stderr = stream
    return 0, ""


def train(world: int, config, *extra: str) -> list[tuple[int, str]]:
    return run_ranks(world, call_cli, ["train", "--config", str(config), *extra])


def train_well(world: int, config, *extra: str) -> None:
    for code, message in train(world, config, *extra):
        assert code == 0, message


def metrics(folder) -> list[dict]:
    """Every line, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


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
    (target / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    shutil.copy(source / "metrics.jsonl", target / "metrics.jsonl")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("world", "tp", "options", "resume_options"),
    [
        (2, 2, {}, []),
        slow(2, 2, {}, ["--set", "quant.requantize=every_forward"]),
        slow(2, 1, {"quant__group_size": 32}, []),
        slow(1, 1, {"quant__enabled": False}, []),
        slow(1, 1, {"training__precision": "fp32", "quant__requantize": "auto"}, []),
    ],
    ids=["tp2", "tp2-other-mode", "dp2", "full-precision", "fp32"],
)
def test_resume_equals_the_uninterrupted_run(
    write_config, tmp_path, world, tp, options, resume_options
):
    options = {**options, "parallel__tensor_model_parallel_size": tp}
    train_well(world, write_config("whole", **options))
    resumed = write_config("resumed", **options)
    keep_only(tmp_path / "whole", tmp_path / "resumed", 4)
    train_well(world, resumed, "--resume", *resume_options)
    drop_flips = [
        [{k: v for k, v in line.items() if k != "flip_fraction"} for line in metrics(folder)]
        for folder in (tmp_path / "whole", tmp_path / "resumed")
    ]
    assert drop_flips[0] == drop_flips[1]
    whole = tensors(tmp_path / "whole" / "iter_0000008")
    again = tensors(tmp_path / "resumed" / "iter_0000008")
    assert whole.keys() == again.keys()
    different = [name for name in whole if not torch.equal(whole[name], again[name])]
    assert different == []


def test_a_run_learns_logs_and_leaves_everything_behind(write_config, tmp_path):
    config = write_config("run", training__train_iters=40, training__eval_interval=20)
    train_well(1, config)
    lines = metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1.0
    assert {"learning_rate", "grad_norm", "zero_fraction", "flip_fraction"} <= lines[5].keys()
    assert 0.1 < lines[5]["zero_fraction"] < 0.6 and 0 < lines[5]["flip_fraction"] < 0.5
    assert [line["iteration"] for line in lines if "valid_loss" in line] == [20, 40]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    state = json.loads((tmp_path / "run" / "iter_0000040" / "bitcpm_state.json").read_text())
    assert state["iteration"] == 40 and state["consumed_samples"] == 320
    assert state["quantizer"]["group_size"] == -1
    assert not list((tmp_path / "run").glob(".tmp*"))


@pytest.mark.slow
def test_tp_does_not_change_the_first_loss(write_config, tmp_path):
    for tp in (1, 2):
        config = write_config(
            f"tp{tp}", parallel__tensor_model_parallel_size=tp, training__train_iters=1,
            optimizer__lr_warmup_iters=0,
        )  # fmt: skip
        train_well(tp, config)
    one, two = (metrics(tmp_path / f"tp{tp}")[0] for tp in (1, 2))
    # bf16 partial sums of the row-parallel products differ in the last bits.
    assert one["loss"] == pytest.approx(two["loss"], abs=2e-3)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_non_finite_gradients_stop_the_run(write_config, precision):
    config = write_config(
        training__precision=precision, quant__requantize="auto",
        optimizer__lr=1e30, optimizer__lr_warmup_iters=0, training__train_iters=30,
        guard__max_skipped_steps=3, training__eval_interval=30, checkpoint__save_interval=30,
    )  # fmt: skip
    code, message = train(1, config)[0]
    assert code == 2
    assert "guard.max_skipped_steps=3: 3 steps in a row had non-finite gradients" in message


def test_a_run_can_be_continued_with_another_schedule(write_config, tmp_path):
    train_well(1, write_config("run"))
    longer = write_config(
        "run", training__train_iters=12, optimizer__lr=1e-3, optimizer__lr_wsd_decay_iters=2,
        optimizer__adam_beta2=0.9,
    )  # fmt: skip
    train_well(1, longer, "--resume")
    rates = {m["iteration"]: m["learning_rate"] for m in metrics(tmp_path / "run") if "loss" in m}
    assert [rates[i] for i in (4, 9, 10, 12)] == [5e-3, 1e-3, 1e-3, 0.0]
    common = torch.load(tmp_path / "run" / "iter_0000012" / "common.pt", weights_only=False)
    groups = common["optimizer"]["optimizer"]["param_groups"]
    assert {group["betas"] for group in groups} == {(0.9, 0.9)}


def test_other_data_is_not_continued_with(write_config, corpus, tmp_path):
    from megatron_bitcpm.data.prepare import prepare

    train_well(1, write_config("run"))
    prepare(
        [corpus / "text.txt"], corpus / "tokenizer", tmp_path / "other",
        valid_fraction=0.2, document_chars=300, show_progress=False,
    )  # fmt: skip
    arguments = ["--resume", "--set", f"data.prefix={tmp_path / 'other'}"]
    code, message = train(1, tmp_path / "run.yaml", *arguments)[0]
    assert code == 2
    assert "other_train: is not what the checkpoint iter_0000008 was trained with" in message
    assert "other_valid: is not what the checkpoint iter_0000008 was trained with" in message


def test_a_folder_that_cannot_be_written_stops_every_rank(write_config, tmp_path):
    (tmp_path / "run").write_text("a file")
    config = write_config("run", parallel__tensor_model_parallel_size=2)
    for code, message in train(2, config):
        assert code == 2 and "checkpoint.directory=" in message and "File exists" in message


def crash_while_saving(rank: int, arguments: list[str]) -> str:
    from megatron_bitcpm.checkpoint import state

    original = state.save_state

    def dies(folder, *args):
        original(folder, *args)
        if folder.name.endswith("8"):
            raise RuntimeError("killed")

    state.save_state = dies
    try:
        main(arguments)
    except RuntimeError as error:
        return str(error)
    finally:
        state.save_state = original
    return "finished"


def test_a_checkpoint_is_complete_or_absent(write_config, tmp_path):
    config = write_config("run")
    assert run_ranks(1, crash_while_saving, ["train", "--config", str(config)]) == ["killed"]
    names = sorted(path.name for path in (tmp_path / "run").glob("*iter*"))
    assert names == [".tmp-iter_0000008", "iter_0000004", "latest_checkpointed_iteration.txt"]
    train_well(1, config, "--resume")
    assert (tmp_path / "run" / "iter_0000008" / "bitcpm_state.json").exists()
    assert not list((tmp_path / "run").glob(".tmp*"))


BAD_INPUTS = {
    "tp and heads": ({"model__num_query_groups": 1}, [], "model.num_query_groups=1: is not a mul"),
    "world": ({"parallel__tensor_model_parallel_size": 3}, [], "does not divide the world size 2"),
    "group": ({"quant__group_size": 48}, [], "quant.group_size=48: does not divide 64"),
    "data": ({"data__prefix": "/no/such"}, [], "/no/such"),
    "tokenizer": ({"data__tokenizer": "/no/such"}, [], "/no/such"),
    "nothing to resume": ({}, ["--resume"], "is neither a checkpoint nor a run with one"),
    "validation": ({"training__eval_iters": 1000}, [], "valid_samples=8000: the valid split has"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_on_every_rank(write_config, tmp_path, name):
    overrides, extra, expected = BAD_INPUTS[name]
    config = write_config("run", **{"parallel__tensor_model_parallel_size": 2, **overrides})
    for code, message in train(2, config, *extra):
        lines = [line for line in message.splitlines() if "bitcpm: " in line]
        assert code == 2 and expected in lines[0], message
        assert lines[0].startswith("[rank ") and lines[0].endswith(".")
        assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_another_model_or_a_finished_folder_is_refused(write_config, tmp_path):
    train_well(1, write_config("run"))
    code, message = train(1, tmp_path / "run.yaml")[0]
    assert code == 2 and "holds checkpoints of an earlier run. Use --resume" in message
    other = ["--resume", "--set", "model.num_layers=3", "--set", "quant.group_size=32"]
    code, message = train(1, tmp_path / "run.yaml", *other)[0]
    assert code == 2
    assert "model.num_layers=3: the checkpoint iter_0000008 was trained with 2" in message
    assert "quant.group_size=32: the checkpoint iter_0000008 was trained with -1" in message
    (tmp_path / "run" / "iter_0000008" / "__0_0.distcp").write_bytes(b"")
    code, message = train(1, tmp_path / "run.yaml", "--resume", "--set", "training.train_iters=9")[
        0
    ]
    assert code == 2 and "iter_0000008: cannot be loaded" in message, message
