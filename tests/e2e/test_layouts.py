"""Parallel layouts of the trainer: each runs, saves, resumes, and agrees with one rank."""

from __future__ import annotations

import functools

import pytest
import torch
import yaml
from helpers.runs import keep_only, metrics, numbers, tensors, tiny_config, train_well

pytestmark = pytest.mark.both_versions

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-interleaved": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "dp2": (2, {}),
    "dp2-sharded": (2, {"use_distributed_optimizer": True}),
    "dp2-sharded-overlap": (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "ddp_bucket_size": 20000,
        },
    ),
    "dp2-overlap": (2, {"overlap_grad_reduce": True}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2-sp-pp2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
        },
    ),
    "tp2-sp-cp2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    ),
    "pp2-interleaved-dp2-sharded-overlap": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
}
FAST = ()  # tests/models has layouts that run in a second


def options(layout: dict, **more) -> dict:
    """Settings of a run in fp32 with the given layout; 4 layers, 4 micro-batches at dp 1."""
    return {
        "model__num_layers": 4,
        "training__precision": "fp32",
        "quant__requantize": "auto",
        "training__eval_interval": 2,
        "checkpoint__save_interval": 2,
        **{f"parallel__{key}": value for key, value in layout.items()},
        **more,
    }


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, corpus):
    """Return the folder of a run of 6 steps on one rank, saved every 2; by optimizer state."""
    folder = tmp_path_factory.mktemp("one-rank")

    @functools.cache
    def run(is_sharded: bool):
        name = "sharded" if is_sharded else "plain"
        layout = {"use_distributed_optimizer": is_sharded}
        tree = tiny_config(corpus, folder / name, **options(layout, training__train_iters=6))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        train_well(1, folder / f"{name}.yaml")
        return folder / name

    return run


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_a_layout_agrees_with_one_rank(write_config, one_rank, tmp_path, name):
    world, layout = LAYOUTS[name]
    is_sharded = layout.get("use_distributed_optimizer", False)
    base = one_rank(is_sharded)
    settings = options(layout, training__train_iters=6)
    # From the same checkpoint ...
    keep_only(base, tmp_path / "resumed", 2)
    train_well(world, write_config("resumed", **settings), "--resume")
    # ... and from the start: initial weights do not depend on the layout.
    train_well(world, write_config("fresh", **settings))
    for run, first in (("resumed", 3), ("fresh", 1)):
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
            wanted, found = numbers(base, key), numbers(tmp_path / run, key)
            assert found[first] == pytest.approx(wanted[first], rel=tolerance / 10), (run, key)
            assert found[6] == pytest.approx(wanted[6], rel=20 * tolerance), (run, key)
        assert numbers(tmp_path / run, "valid_loss")[6] == pytest.approx(
            numbers(base, "valid_loss")[6], rel=1e-4
        )
    # Back on one rank, from what the layout saved.
    keep_only(tmp_path / "fresh", tmp_path / "back", 4)
    # One step tells.
    back = options({"use_distributed_optimizer": is_sharded}, training__train_iters=5)
    train_well(1, write_config("back", **back), "--resume")
    for key in ("loss", "grad_norm"):
        found, wanted = numbers(tmp_path / "back", key), numbers(tmp_path / "fresh", key)
        assert found[5] == pytest.approx(wanted[5], rel=1e-5)


@pytest.mark.parametrize(
    ("recompute", "layout"),
    [
        pytest.param("selective", "tp2-sp", marks=pytest.mark.slow),
        pytest.param("full", "pp2-interleaved", marks=pytest.mark.slow),
        pytest.param("selective", "cp2", marks=pytest.mark.slow),
        pytest.param("full", "tp2-sp", marks=pytest.mark.slow),
    ],
)
def test_recomputation_changes_nothing(write_config, tmp_path, recompute, layout):
    world, parallel = LAYOUTS[layout]
    for name in ("none", recompute):
        settings = options(
            parallel,
            training__train_iters=3,
            training__precision="bf16",
            training__recompute=name,
            quant__requantize="every_step",
        )
        train_well(world, write_config(name, **settings))
    assert metrics(tmp_path / "none") == metrics(tmp_path / recompute)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("dp2-sharded-overlap", marks=pytest.mark.slow),
        pytest.param("tp2-sp-pp2", marks=pytest.mark.slow),
        pytest.param("pp2-interleaved-dp2-sharded-overlap", marks=pytest.mark.slow),
        pytest.param("cp2", marks=pytest.mark.slow),
    ],
)
def test_resume_in_the_same_layout_is_bitwise(write_config, tmp_path, layout):
    world, parallel = LAYOUTS[layout]
    settings = options(
        parallel,
        training__precision="bf16",
        quant__requantize="every_step",
        training__train_iters=6,
        checkpoint__save_interval=3,
        training__eval_interval=3,
    )
    train_well(world, write_config("whole", **settings))
    resumed = write_config("resumed", **settings)
    keep_only(tmp_path / "whole", tmp_path / "resumed", 3)
    train_well(world, resumed, "--resume")
    for key in ("loss", "grad_norm", "valid_loss"):
        assert numbers(tmp_path / "whole", key) == numbers(tmp_path / "resumed", key)
    whole = tensors(tmp_path / "whole" / "iter_0000006")
    again = tensors(tmp_path / "resumed" / "iter_0000006")
    assert [n for n in whole if not torch.equal(whole[n], again[n])] == []
