"""The configuration: every problem in one go, each with its fix."""

from __future__ import annotations

import pytest
import yaml

from megatron_bitcpm.config import RunConfig, load_config, parse_config
from megatron_bitcpm.errors import ConfigError

BASE = {
    "model": {
        "num_layers": 2,
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "max_position_embeddings": 64,
    },
    "data": {"prefix": "d", "tokenizer": "t", "seq_length": 64},
    "optimizer": {"lr": 1e-3},
    "training": {"train_iters": 10, "micro_batch_size": 2, "global_batch_size": 4},
    "checkpoint": {"directory": "run"},
}


def problems(overrides: list[str], world_size: int = 1, text: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text or yaml.safe_dump(BASE), overrides, world_size)
    return caught.value.problems


def test_defaults_and_round_trip():
    config = parse_config(yaml.safe_dump(BASE))
    assert config.quant.enabled and config.quant.group_size == -1 and config.quant.eps == 1e-5
    assert parse_config(config.to_yaml()) == config


def test_set_overrides_win_and_parse_yaml():
    config = parse_config(
        yaml.safe_dump(BASE), ["quant.group_size=64", "quant.exclude=['*.linear_proj']"]
    )
    assert config.quant.group_size == 64 and config.quant.exclude == ("*.linear_proj",)


def test_unknown_keys_name_the_nearest():
    assert problems(["quant.groupsize=64"]) == [
        "quant.groupsize=64: unknown key. Did you mean group_size."
    ]
    assert "Did you mean training" in problems(["trainning={}"])[0]


def test_all_problems_at_once():
    found = problems(
        ["parallel.tensor_model_parallel_size=4", "quant.group_size=48",
         "training.global_batch_size=3", "optimizer.min_lr=1", "data.seq_length=65"],
        world_size=6,
    )  # fmt: skip
    assert [line.split("=")[0] for line in found] == [
        "parallel.tensor_model_parallel_size",
        "model.num_query_groups",
        "data.seq_length",
        "training.global_batch_size",
        "optimizer.min_lr",
        "quant.group_size",
    ]
    assert "Start a multiple of 4 ranks, or use 1, 2, 3, 6." in found[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quant.group_size=0", "quant.group_size=0: is not a size. Use -1 for the whole row."),
        (
            "quant.group_size=96",
            "quant.group_size=96: does not divide 256 (hidden_size), 256 (attention width / tp 1), "
            "512 (ffn_hidden_size / tp 1). Use 32, 64, 128 or -1.",
        ),
        ("quant.eps=0", "quant.eps=0: must be greater than or equal to "),
        ("quant.grid=five", "quant.grid=five: must be 'ternary'. Correct the value."),
        ("model.num_attention_heads=3", "does not divide hidden_size 256"),
        ("model.num_query_groups=3", "does not divide num_attention_heads 4. Use 1, 2, 4."),
        ("model.kv_channels=33", "RoPE needs an even head dimension"),
        ("optimizer.lr_warmup_iters=10", "is not shorter than training.train_iters 10"),
        ("optimizer.lr_wsd_decay_iters=11", "with the warm-up exceeds training.train_iters 10"),
        ("quant.full_precision_first_layers=2", "leaves none of 2 layers"),
        ("training.precision=fp16", "must be 'bf16' or 'fp32'"),
        ("training.train_iters=x", "must be a valid integer"),
        ("model=3", "model=3: must be a valid dictionary"),
        ("a.b", "--set=a.b: is not key=value. Write --set a.b=1."),
    ],
)
def test_single_problems(override, expected):
    assert any(expected in line for line in problems([override])), problems([override])


def test_settings_without_effect_are_errors():
    found = problems(["optimizer.lr_decay_style=cosine", "optimizer.lr_wsd_decay_iters=2"])
    assert "has no effect with lr_decay_style cosine" in found[0]
    found = problems(["quant.requantize=every_step", "training.precision=fp32"])
    assert "no separate main parameters" in found[0]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="is not a YAML mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="Correct the YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_missing_keys_are_named():
    found = problems([], text="model: {num_layers: 2}")
    assert "model.hidden_size=(absent): is required. Add the key." in found
    assert "training=(absent): is required. Add the key." in found


def test_every_field_is_described():
    for section in RunConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, name
