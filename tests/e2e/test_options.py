"""Options of a run that are about where it begins, what it reads and what it keeps."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers.corpora import prepare_corpus
from helpers.runs import metrics, numbers, tensors, tiny_config, tracked, train, train_well

pytestmark = pytest.mark.both_versions


def model_tensors(checkpoint) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors(checkpoint).items() if not k.startswith("optimizer.")}


@pytest.mark.parametrize(
    ("source", "world", "layout"),
    [
        ({"quant__enabled": False}, 2, {"parallel__tensor_model_parallel_size": 2}),
        pytest.param(
            {"training__precision": "fp32", "quant__requantize": "auto"},
            2,
            {"parallel__use_distributed_optimizer": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"parallel__tensor_model_parallel_size": 1},
            2,
            {"parallel__pipeline_model_parallel_size": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["full-precision", "ternary-fp32", "ternary-pp2"],
)
@pytest.mark.slow
def test_init_from_takes_the_latent_weights_only(write_config, tmp_path, source, world, layout):
    train_well(1, write_config("source", **source))
    # At such a rate no weight moves: what is saved is what was begun with.
    settings = {
        **layout,
        "training__train_iters": 1,
        "optimizer__lr_warmup_iters": 0,
        "optimizer__lr": 1e-13,
        "checkpoint__init_from": str(tmp_path / "source"),
        "quant__requantize": "every_step",
    }
    train_well(world, write_config("begun", **settings))
    given = model_tensors(tmp_path / "source" / "iter_0000008")
    taken = model_tensors(tmp_path / "begun" / "iter_0000001")
    assert given.keys() == taken.keys()
    assert [n for n in given if not torch.equal(given[n].to(torch.bfloat16), taken[n])] == []
    state = json.loads((tmp_path / "begun" / "iter_0000001" / "bitcpm_state.json").read_text())
    assert state["iteration"] == 1 and state["consumed_samples"] == 8
    assert "exp_avg" in " ".join(tensors(tmp_path / "begun" / "iter_0000001"))


@pytest.mark.slow
def test_init_from_needs_the_same_model(write_config, tmp_path):
    train_well(1, write_config("source"))
    config = write_config(
        "begun", checkpoint__init_from=str(tmp_path / "source"), model__num_layers=3
    )
    code, message = train(1, config)[0]
    assert code == 2 and "model.num_layers=3: checkpoint.init_from " in message
    config = write_config("begun", checkpoint__init_from=str(tmp_path / "absent"))
    code, message = train(1, config)[0]
    assert code == 2 and "absent: is neither a checkpoint nor a run with one" in message
    assert not (tmp_path / "begun").exists()


def test_init_from_needs_the_same_tokenizer(write_config, corpus, tmp_path):
    one_step = {"training__train_iters": 1, "optimizer__lr_warmup_iters": 0}
    train_well(1, write_config("source", **one_step))
    # As many ids, so that every weight would fit; but they mean other pieces.
    text = (corpus / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.translate(str.maketrans("aeio", "oiea")))
    prepare_corpus(tmp_path / "text.txt", tmp_path / "tokenizer", tmp_path / "other", 0.1, 400)
    config = write_config(
        "begun",
        checkpoint__init_from=str(tmp_path / "source"),
        data__prefix=str(tmp_path / "other"),
        data__tokenizer=str(tmp_path / "tokenizer"),
        **one_step,
    )
    code, message = train(1, config)[0]
    assert code == 2 and "iter_0000001 was trained with another tokenizer" in message, message
    assert f"data.tokenizer={tmp_path / 'tokenizer'}: checkpoint.init_from " in message
    assert not list((tmp_path / "begun").glob("*iter_*"))


@pytest.mark.slow
def test_a_blend_with_named_validation_sets(write_config, corpus, tmp_path):
    from megatron_bitcpm.data.prepare import prepare

    prepare(
        [corpus / "text.txt"],
        corpus / "tokenizer",
        tmp_path / "other",
        valid_fraction=0.3,
        document_chars=250,
        show_progress=False,
    )
    tree = tiny_config(
        corpus,
        tmp_path / "run",
        data__reset_attention_mask=True,
        data__reset_position_ids=True,
        data__eod_mask_loss=True,
    )
    one = tree["data"].pop("prefix")
    tree["data"]["blend"] = [
        {"prefix": one, "weight": 1},
        {"prefix": str(tmp_path / "other"), "weight": 3},
    ]
    tree["data"]["valid"] = {"long": one, "short": str(tmp_path / "other")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    train_well(2, tmp_path / "run.yaml")
    lines = [line for line in metrics(tmp_path / "run") if "valid_loss" in line]
    assert [line["iteration"] for line in lines] == [4, 8]
    for line in lines:
        parts = [line["valid_loss/long"], line["valid_loss/short"]]
        assert line["valid_loss"] == pytest.approx(sum(parts) / 2) and parts[0] != parts[1]
    # The order does not depend on the ranks.
    tree["checkpoint"]["directory"] = str(tmp_path / "alone")
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(tree))
    train_well(1, tmp_path / "alone.yaml")
    two, alone = numbers(tmp_path / "run", "loss"), numbers(tmp_path / "alone", "loss")
    assert two[1] == pytest.approx(alone[1], abs=1e-4)
    assert two[8] == pytest.approx(alone[8], abs=1e-2)
    # On resume a weight may not change, a validation set may.
    tree["data"]["blend"][0]["weight"] = 2
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(tree))
    code, message = train(1, tmp_path / "alone.yaml", "--resume")[0]
    assert code == 2 and "data.blend=" in message and "is not what the checkpoint" in message
    tree["data"]["blend"][0]["weight"] = 1
    del tree["data"]["valid"]["long"]
    tree["training"]["train_iters"] = 9
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(tree))
    train_well(1, tmp_path / "alone.yaml", "--resume")


@pytest.mark.slow
def test_fp16_finds_its_loss_scale(write_config, tmp_path):
    # So large a first scale overflows: steps are skipped until it fits.
    config = write_config(
        "run",
        training__precision="fp16",
        optimizer__initial_loss_scale=2.0**24,
        training__train_iters=24,
        guard__max_skipped_steps=20,
    )
    train_well(1, config)
    scales, skipped = (numbers(tmp_path / "run", k) for k in ("loss_scale", "skipped_steps"))
    assert scales[1] == 2.0**24 and scales[24] < 2.0**24
    assert 2 <= skipped[24] < 20
    losses = numbers(tmp_path / "run", "loss")
    assert losses[24] < losses[1] - 0.3


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.slow
def test_only_the_wanted_checkpoints_stay(write_config, tmp_path, async_save):
    config = write_config(
        "run",
        training__train_iters=10,
        checkpoint__save_interval=1,
        checkpoint__keep_last_n=2,
        checkpoint__keep_every_n=4,
        checkpoint__async_save=async_save,
    )
    message = train_well(1, config)[0]
    kept = sorted(path.name for path in (tmp_path / "run").glob("*iter_*") if path.is_dir())
    assert kept == [f"iter_{n:07d}" for n in (4, 8, 9, 10)]
    assert tracked(tmp_path / "run") == 10
    assert ("saved; training waited" in message) == async_save
    stalls = [
        json.loads(line).get("save_stall_s")
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any(stalls)
