"""Whole runs of the trainer: learning, resuming bit for bit, stopping cleanly."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.runs import keep_only, metrics, tensors, train, train_well


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def without_flips(folder) -> list[dict]:
    """All metrics but those that compare with the line before, which a new process has not."""
    lines = metrics(folder)
    for line in lines:
        for values in (line, *line.get("layers", {}).values()):
            values.pop("flip_fraction", None)
    return lines


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
    assert without_flips(tmp_path / "whole") == without_flips(tmp_path / "resumed")
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
            f"tp{tp}",
            parallel__tensor_model_parallel_size=tp,
            training__train_iters=1,
            optimizer__lr_warmup_iters=0,
        )
        train_well(tp, config)
    one, two = (metrics(tmp_path / f"tp{tp}")[0] for tp in (1, 2))
    # bf16 partial sums of the row-parallel products differ in the last bits.
    assert one["loss"] == pytest.approx(two["loss"], abs=2e-3)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_non_finite_gradients_stop_the_run(write_config, precision):
    config = write_config(
        training__precision=precision,
        quant__requantize="auto",
        optimizer__lr=1e30,
        optimizer__lr_warmup_iters=0,
        training__train_iters=30,
        guard__max_skipped_steps=3,
        training__eval_interval=30,
        checkpoint__save_interval=30,
    )
    code, message = train(1, config)[0]
    assert code == 2
    assert (
        "guard.max_skipped_steps=3: 3 step(s) in a row had a non-finite loss or gradient" in message
    )


@pytest.mark.slow
def test_a_run_can_be_continued_with_another_schedule(write_config, tmp_path):
    train_well(1, write_config("run"))
    longer = write_config(
        "run",
        training__train_iters=12,
        optimizer__lr=1e-3,
        optimizer__lr_wsd_decay_iters=2,
        optimizer__adam_beta2=0.9,
    )
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
        [corpus / "text.txt"],
        corpus / "tokenizer",
        tmp_path / "other",
        valid_fraction=0.2,
        document_chars=300,
        show_progress=False,
    )
    arguments = ["--resume", "--set", f"data.prefix={tmp_path / 'other'}"]
    code, message = train(1, tmp_path / "run.yaml", *arguments)[0]
    assert code == 2
    assert "other_train: is not what the checkpoint iter_0000008 was trained with" in message


def test_a_folder_that_cannot_be_written_stops_every_rank(write_config, tmp_path):
    (tmp_path / "run").write_text("a file")
    config = write_config("run", parallel__tensor_model_parallel_size=2)
    for code, message in train(2, config):
        assert code == 2 and "checkpoint.directory=" in message and "File exists" in message


BAD_INPUTS = {
    "tp and heads": (
        {"model__num_attention_heads": 3, "model__num_query_groups": 1, "model__kv_channels": 16},
        [],
        "parallel.tensor_model_parallel_size=2: does not divide num_attention_heads 3. Use 1.",
    ),
    "world": ({"parallel__tensor_model_parallel_size": 3}, [], "does not divide the world size 2"),
    "group": ({"quant__group_size": 48}, [], "quant.group_size=48: does not divide the inputs"),
    "data": ({"data__prefix": "/no/such"}, [], "/no/such"),
    "tokenizer": ({"data__tokenizer": "/no/such"}, [], "/no/such"),
    "nothing to resume": ({}, ["--resume"], "is neither a checkpoint nor a run with one"),
    "validation": (
        {"training__eval_iters": 1000},
        [],
        "/text: the valid split has 147 windows of 32 tokens, 8000 are needed",
    ),
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


@pytest.mark.slow
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
    assert code == 2 and "__0_0.distcp has 0 of " in message, message
