"""Quantisers other than the default in whole runs: configuration, training, checkpoint, resume."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.runs import metrics, numbers, tensors, train_well

pytestmark = pytest.mark.both_versions

SEQUENCE_PARALLEL = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}


@pytest.mark.parametrize(
    "quantiser",
    [
        {"quant__group_size": "tensor", "quant__activation": "int8_per_token"},
        {"quant__grid": "five", "quant__group_size": 16},
        {"quant__grid": "half_sym4", "quant__activation": "int8_per_token"},
    ],
    ids=["tensor-int8", "five-groups", "half-int8"],
)
@pytest.mark.slow
def test_both_modes_are_one_run(write_config, tmp_path, quantiser):
    settings = {
        **SEQUENCE_PARALLEL,
        **quantiser,
        "training__recompute": "full",
        "training__train_iters": 4,
    }
    printed = train_well(2, write_config("step", quant__requantize="every_step", **settings))[0]
    train_well(2, write_config("forward", quant__requantize="every_forward", **settings))
    step, forward = metrics(tmp_path / "step"), metrics(tmp_path / "forward")
    assert step == forward and len(step) >= 4
    assert "activation int8_per_token" in printed or "quant__activation" not in quantiser
    ours, theirs = (tensors(tmp_path / n / "iter_0000004") for n in ("step", "forward"))
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    state = json.loads((tmp_path / "step" / "iter_0000004" / "bitcpm_state.json").read_text())
    for key, value in quantiser.items():
        assert state["quantizer"][key.removeprefix("quant__")] == value


@pytest.mark.slow
def test_resume_at_another_layout(write_config, tmp_path):
    """One scale per projection: only the slices of row-parallel rows show, in the last bits."""
    settings = {
        "quant__group_size": "tensor",
        "training__precision": "fp32",
        "quant__requantize": "auto",
    }
    config = write_config("run", **SEQUENCE_PARALLEL, **settings)
    train_well(2, config)
    longer = {**settings, "training__train_iters": 9}
    train_well(1, write_config("run", **longer), "--resume")
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "iter_0000009")
    (tmp_path / "two" / "latest_checkpointed_iteration.txt").write_text("8")
    train_well(2, write_config("two", **SEQUENCE_PARALLEL, **longer), "--resume")
    losses = [numbers(tmp_path / name, "loss")[9] for name in ("run", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_other_quantisers_learn(write_config, tmp_path):
    """Not more than that the loss falls: the numbers are those of other tests."""
    for grid in ("asym4", "half_sym4", "int_sym4", "five"):
        train_well(1, write_config(grid, quant__grid=grid, training__train_iters=24))
        losses = [line["loss"] for line in metrics(tmp_path / grid) if "loss" in line]
        assert losses[-1] < losses[0] - 0.5, (grid, losses)
