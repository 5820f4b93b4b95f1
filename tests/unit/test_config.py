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
        ("training.train_iters=true", "train_iters=True: must be a number, not true or false."),
        ("checkpoint.save_interval=true", "must be a number, not true or false"),
        ("optimizer.lr=true", "must be a number, not true or false"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: must be a finite number"),
        ("optimizer.lr=1e400", "optimizer.lr=1e400: must be a finite number"),
        ("optimizer.adam_eps=.nan", "optimizer.adam_eps=nan: must be a finite number"),
        ("quant.eps=.inf", "quant.eps=inf: must be a finite number"),
        ("data.prefix=2026-13-45", "--set=data.prefix=2026-13-45: the value is not YAML"),
        ('training.precision="a\\nb"', "training.precision=a b: must be 'bf16' or 'fp32'"),
        ('data.prefx="a\\nb"', "data.prefx=a b: unknown key. Did you mean prefix."),
        (
            "optimizer.lr_warmup_iters=9",
            "optimizer.lr_warmup_iters=9: with the default decay of 2 steps exceeds "
            "training.train_iters 10. Use at most 8, or set optimizer.lr_wsd_decay_iters.",
        ),
        ("model=3", "model=3: must be a valid dictionary"),
        ("a.b", "--set=a.b: is not key=value. Write --set a.b=1."),
    ],
)
def test_single_problems(override, expected):
    found = problems([override])
    assert any(expected in line for line in found), found
    assert not any("\n" in line for line in found)


def test_numbers_written_as_yaml_reads_them_as_text():
    assert parse_config(yaml.safe_dump(BASE), ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3


def test_decay_defaults():
    config = parse_config(yaml.safe_dump(BASE), ["optimizer.lr_warmup_iters=8"])
    optimizer = config.optimizer
    assert optimizer.wsd_decay_style == "minus_sqrt"
    assert [optimizer.wsd_decay_iters(n) for n in (1, 4, 10, 100)] == [1, 1, 2, 20]
    given = optimizer.model_copy(
        update={"lr_wsd_decay_iters": 7, "lr_wsd_decay_style": "exponential"}
    )
    assert (given.wsd_decay_iters(100), given.wsd_decay_style) == (7, "exponential")


@pytest.mark.parametrize("style", ["WSD", "cosine", "constant"])
def test_saved_configurations_load_with_every_schedule(style):
    # The warm-up would overlap a decay that only WSD has.
    warmup = 8 if style == "WSD" else 9
    overrides = [f"optimizer.lr_decay_style={style}", f"optimizer.lr_warmup_iters={warmup}"]
    config = parse_config(yaml.safe_dump(BASE), overrides)
    assert parse_config(config.to_yaml()) == config


def test_settings_without_effect_are_errors():
    found = problems(["optimizer.lr_decay_style=cosine", "optimizer.lr_wsd_decay_iters=2"])
    assert "has no effect with lr_decay_style cosine" in found[0]
    for style in ("cosine", "constant"):
        found = problems(
            [f"optimizer.lr_decay_style={style}", "optimizer.lr_wsd_decay_style=linear"]
        )
        assert found == [
            "optimizer.lr_wsd_decay_style=linear: has no effect with lr_decay_style "
            f"{style}. Remove it, or use WSD."
        ]
    found = problems(["optimizer.lr_decay_style=constant", "optimizer.min_lr=1e-4"])
    assert found == [
        "optimizer.min_lr=0.0001: has no effect with lr_decay_style constant. "
        "Remove it, or use WSD or cosine."
    ]
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
