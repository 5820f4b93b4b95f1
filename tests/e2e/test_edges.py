"""Situations at the edge: stages without ternary linears, other ranks' folders, foreign files."""

from __future__ import annotations

import signal

import pytest
import yaml
from helpers.ranks import run_ranks
from helpers.runs import (
    call_cli,
    disturb,
    numbers,
    tensors,
    tiny_config,
    tracked,
    train,
    train_well,
)

pytestmark = pytest.mark.both_versions


@pytest.mark.parametrize("edge", ["first", pytest.param("last", marks=pytest.mark.slow)])
def test_a_stage_without_ternary_linears(write_config, tmp_path, edge):
    config = write_config(
        "run",
        parallel__pipeline_model_parallel_size=2,
        training__train_iters=3,
        **{f"quant__full_precision_{edge}_layers": 1},
    )
    train_well(2, config)
    assert set(numbers(tmp_path / "run", "zero_fraction")) == {1, 2, 3}
    assert set(numbers(tmp_path / "run", "flip_fraction")) == {2, 3}


@pytest.mark.slow
def test_resume_with_other_names_of_validation_sets(write_config, corpus, tmp_path):
    train_well(1, write_config("run"))
    tree = tiny_config(corpus, tmp_path / "run", training__train_iters=9)
    tree["data"]["valid"] = {"anew": tree["data"]["prefix"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    train_well(1, tmp_path / "run.yaml", "--resume")
    tree["model"]["rope_scaling"] = {
        "short_factor": [1.0] * 8,
        "long_factor": [1.0] * 8,
        "original_max_position_embeddings": 32,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    code, message = train(1, tmp_path / "run.yaml", "--resume")[0]
    assert code == 2 and "was trained with (absent)" in message and "Traceback" not in message


def train_seeing_the_past(rank: int, arguments: list[str], old: str) -> tuple[int, str]:
    """Train; to all ranks but the first an earlier checkpoint looks like the newest."""
    from pathlib import Path

    from megatron_bitcpm.training import checkpointing

    original = checkpointing.find_checkpoint
    if rank:
        checkpointing.find_checkpoint = lambda path: Path(old)
    try:
        return call_cli(rank, arguments)
    finally:
        checkpointing.find_checkpoint = original


@pytest.mark.slow
def test_all_ranks_begin_from_the_checkpoint_that_the_first_one_sees(write_config, tmp_path):
    train_well(1, write_config("source"))
    config = write_config(
        "begun",
        parallel__tensor_model_parallel_size=2,
        training__train_iters=1,
        optimizer__lr_warmup_iters=0,
        optimizer__lr=1e-13,
        checkpoint__init_from=str(tmp_path / "source"),
    )
    old = str(tmp_path / "source" / "iter_0000004")
    for code, message in run_ranks(
        2, train_seeing_the_past, ["train", "--config", str(config)], old
    ):
        assert code == 0, message
    name = "decoder.layers.mlp.linear_fc2.weight"
    newest = tensors(tmp_path / "source" / "iter_0000008")[name]
    assert tensors(tmp_path / "begun" / "iter_0000001")[name].equal(newest)


def test_foreign_files_in_the_folder_stay(write_config, tmp_path):
    folder = tmp_path / "run"
    (folder / ".old-photos").mkdir(parents=True)
    (folder / ".tmp-iter_0000003").mkdir()
    (folder / ".tmp-notes").write_text("mine")
    (folder / "metrics.jsonl").write_text('{"loss": 1}\nnonsense\n[1]\n')
    train_well(1, write_config("run", training__train_iters=4))
    assert (folder / ".old-photos").is_dir() and (folder / ".tmp-notes").read_text() == "mine"
    assert not (folder / ".tmp-iter_0000003").exists()
    assert list(numbers(folder, "loss")) == [1, 2, 3, 4]


def test_a_folder_has_one_run_at_a_time(write_config, tmp_path):
    settings = {"training__train_iters": 300, "training__eval_interval": 300}
    config = write_config("run", **settings, checkpoint__save_interval=300)
    log = tmp_path / "run" / "metrics.jsonl"
    refused = []

    def second_start() -> bool:
        if not (log.is_file() and log.read_text()):
            return False
        refused.append(train(1, config)[0])
        return True

    arguments = ["train", "--config", str(config)]
    assert disturb(1, arguments, second_start, signal.SIGTERM) == [0]
    code, message = refused[0]
    assert code == 2 and "another run is writing there" in message
    assert tracked(tmp_path / "run") > 0


def test_metrics_that_cannot_be_opened_stop_every_rank(write_config, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    for code, message in train(2, write_config("run")):
        assert code == 2 and "checkpoint.directory=" in message and "Traceback" not in message


@pytest.mark.slow
def test_overlapping_buckets_are_refused_where_megatron_makes_them(write_config):
    from megatron_bitcpm.patching.versions import megatron_version

    config = write_config(
        "run",
        parallel__pipeline_model_parallel_size=2,
        parallel__use_distributed_optimizer=True,
        parallel__overlap_grad_reduce=True,
        parallel__overlap_param_gather=True,
        parallel__ddp_bucket_size=30000,
        model__share_embeddings_and_output_weights=True,
        training__train_iters=3,
    )
    for code, message in train(2, config):
        if megatron_version() >= (0, 13):
            assert code == 0, message
        else:
            assert code == 2 and "Traceback" not in message
            assert "parallel.ddp_bucket_size=30000: this megatron-core lays out over" in message
