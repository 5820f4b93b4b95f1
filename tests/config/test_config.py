"""The configuration: every problem in one go, each with its fix."""

from __future__ import annotations

import pytest
import yaml

from megatron_bitcpm.arch.model import RopeScalingConfig
from megatron_bitcpm.config import BlendEntry, RunConfig, load_config, parse_config
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


def test_one_scale_per_projection_and_other_grids_survive_the_round_trip():
    config = parse_config(
        yaml.safe_dump(BASE),
        [
            "quant.group_size=tensor",
            "quant.grid=half_sym4",
            "quant.activation=int8_per_token",
            "parallel.tensor_model_parallel_size=4",
        ],
        world_size=4,
    )
    quant = config.quant
    assert (quant.group_size, quant.grid) == ("tensor", "half_sym4")
    assert quant.activation == "int8_per_token"
    assert parse_config(config.to_yaml(), world_size=4) == config


def test_unknown_keys_name_the_nearest():
    assert problems(["quant.groupsize=64"]) == [
        "quant.groupsize=64: unknown key. Did you mean group_size?"
    ]
    assert "Did you mean training" in problems(["trainning={}"])[0]


def test_all_problems_at_once():
    found = problems(
        [
            "parallel.tensor_model_parallel_size=4",
            "quant.group_size=48",
            "training.global_batch_size=3",
            "optimizer.min_lr=1",
            "data.seq_length=65",
        ],
        world_size=6,
    )
    assert [line.split("=")[0] for line in found] == [
        "parallel",
        "training.global_batch_size",
        "data.seq_length",
        "optimizer.min_lr",
        "quant.group_size",
    ]
    assert found[0] == (
        "parallel=tp 4 x pp 1 x cp 1: 4 does not divide the world size 6. "
        "Start a multiple of 4 ranks."
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quant.group_size=0", "quant.group_size=0: must be a whole number of at least 1, -1 for "),
        (
            "quant.group_size=96",
            "quant.group_size=96: does not divide the inputs of a rank, 256 (linear_qkv), "
            "256 (linear_proj), 256 (linear_fc1), 512 (linear_fc2). Use 32, 64, 128 or -1.",
        ),
        ("quant.eps=0", "quant.eps=0: must be greater than or equal to "),
        (
            "quant.grid=six",
            "quant.grid=six: must be one of ternary, asym4, half_sym4, int_sym4, five. ",
        ),
        (
            "quant.group_size=row",
            "quant.group_size=row: must be a whole number of at least 1, -1 for the whole row, or "
            "tensor. Correct the value.",
        ),
        ("quant.group_size=true", "group_size=True: must be a whole number of at least 1, -1 "),
        ("quant.group_size=-2", "quant.group_size=-2: must be a whole number of at least 1, -1 "),
        ("quant.activation=int4", "quant.activation=int4: must be 'none' or 'int8_per_token'."),
        ("model.num_attention_heads=3", "does not divide hidden_size 256"),
        ("model.num_query_groups=3", "does not divide num_attention_heads 4. Use 1, 2, 4."),
        ("model.kv_channels=33", "RoPE needs an even head dimension"),
        ("optimizer.lr_warmup_iters=10", "is not shorter than training.train_iters 10"),
        ("optimizer.lr_wsd_decay_iters=11", "with the warm-up exceeds training.train_iters 10"),
        ("quant.full_precision_first_layers=2", "leaves none of 2 layers"),
        ("training.precision=fp8", "must be 'bf16', 'fp16' or 'fp32'"),
        ("training.train_iters=x", "must be a valid integer"),
        ("training.train_iters=true", "train_iters=True: must be a number, not true or false."),
        ("checkpoint.save_interval=true", "must be a number, not true or false"),
        ("optimizer.lr=true", "must be a number, not true or false"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: must be a finite number"),
        ("optimizer.lr=1e400", "optimizer.lr=1e400: must be a finite number"),
        ("optimizer.adam_eps=.nan", "optimizer.adam_eps=nan: must be a finite number"),
        ("quant.eps=.inf", "quant.eps=inf: must be a finite number"),
        ("data.prefix=2026-13-45", "--set=data.prefix=2026-13-45: the value is not YAML"),
        ('training.precision="a\\nb"', "training.precision=a b: must be 'bf16', 'fp16' or 'fp32'"),
        ('data.prefx="a\\nb"', "data.prefx=a b: unknown key. Did you mean prefix?"),
        (
            "optimizer.lr_warmup_iters=9",
            "optimizer.lr_warmup_iters=9: with the default decay of 2 steps exceeds "
            "training.train_iters 10. Use at most 8, or set optimizer.lr_wsd_decay_iters.",
        ),
        ("model=3", "model=3: must be an object. Correct the value."),
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
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 2000)
    with pytest.raises(ConfigError, match="Correct the YAML"):
        load_config(tmp_path / "deep.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_missing_keys_are_named():
    found = problems([], text="model: {num_layers: 2}")
    assert "model.hidden_size=(absent): is required. Add the key." in found
    assert "training=(absent): is required. Add the key." in found


def test_every_field_is_described():
    sections = [section.annotation for section in RunConfig.model_fields.values()]
    for section in [*sections, BlendEntry, RopeScalingConfig]:
        for name, field in section.model_fields.items():
            assert field.description, name


LAYOUT = ["model.num_layers=8", "model.num_attention_heads=8", "training.global_batch_size=64"]


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.context_parallel_size=2"],
            6,
            "parallel=tp 1 x pp 2 x cp 2: 4 does not divide the world size 6. "
            "Start a multiple of 4 ranks.",
        ),
        (
            ["parallel.pipeline_model_parallel_size=3"],
            3,
            "pipeline_model_parallel_size=3: 8 layers cannot be cut into 3 equal pieces. Use 1, 2,",
        ),
        (
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=3",
            ],
            2,
            "virtual_pipeline_model_parallel_size=3: 8 layers cannot be cut into 6 equal pieces. "
            "Use 2, 4, or leave it out.",
        ),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            1,
            "virtual_pipeline_model_parallel_size=2: has no effect with pipeline size 1. Leave it",
        ),
        (
            [
                "parallel.pipeline_model_parallel_size=2",
                "training.global_batch_size=6",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
            2,
            "gives 3 micro-batches, the interleaved schedule needs a multiple of pp 2",
        ),
        (["parallel.sequence_parallel=true"], 1, "has no effect with tensor_model_parallel_size 1"),
        (["parallel.overlap_param_gather=true"], 2, "without use_distributed_optimizer"),
        (
            ["parallel.overlap_param_gather=true", "parallel.use_distributed_optimizer=true"],
            2,
            "needs overlap_grad_reduce. Set parallel.overlap_grad_reduce=true.",
        ),
        (["parallel.ddp_bucket_size=100"], 2, "has no effect without overlap_grad_reduce"),
        (
            ["parallel.context_parallel_size=2", "data.seq_length=62"],
            2,
            "cannot be cut into 4 equal pieces (context_parallel_size 2, sequence_parallel false)",
        ),
        (
            [
                "parallel.tensor_model_parallel_size=4",
                "model.num_query_groups=8",
                "model.num_attention_heads=8",
                "parallel.sequence_parallel=true",
                "data.seq_length=62",
            ],
            4,
            "cannot be cut into 4 equal pieces",
        ),
        (
            [
                "model.num_query_groups=4",
                "model.num_attention_heads=24",
                "model.kv_channels=16",
                "parallel.tensor_model_parallel_size=6",
            ],
            6,
            "parallel.tensor_model_parallel_size=6: neither divides nor is a multiple of "
            "num_query_groups 4. Use 1, 2, 4, 8.",
        ),
    ],
)
def test_layouts_that_cannot_be(overrides, world, expected):
    found = problems(LAYOUT + overrides, world)
    assert any(expected in line for line in found), found


def test_more_tensor_ranks_than_query_groups_are_allowed():
    overrides = [*LAYOUT, "model.num_query_groups=2", "parallel.tensor_model_parallel_size=4"]
    assert parse_config(yaml.safe_dump(BASE), overrides, 4)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.scale_emb=12", "has no effect with architecture llama. Remove it, or use minicpm."),
        ("model.architecture=minicpm", "model.scale_emb=(absent): is required by"),
        ("optimizer.initial_loss_scale=4", "has no effect with training.precision bf16"),
        ("guard.max_spikes=4", "has no effect without guard.loss_spike_threshold"),
        ("checkpoint.async_save=true", "has no effect without checkpoint.save_interval"),
        ("guard.max_rollbacks=4", "has no effect with guard.action stop"),
        ("guard.action=rollback", "there is no checkpoint to return to before the last step"),
        ("checkpoint.keep_every_n=4", "has no effect without checkpoint.keep_last_n"),
        ("data.prefix=null", "exactly one of data.prefix and data.blend names the training data"),
        ("data.blend=[{prefix: a, weight: 1}]", "exactly one of data.prefix and data.blend"),
        ("data.blend=[{prefx: a, weight: 1}]", "data.blend.0.prefx=a: unknown key. Did you mean"),
        ("data.valid={a b: x}", "should match pattern"),
        ("model.rope_scaling={}", "model.rope_scaling.short_factor=(absent): is required"),
        ("model.rope_scaling={hf_config: absent.json}", "No such file or directory"),
    ],
)
def test_settings_that_need_others(override, expected):
    found = problems([override])
    assert any(expected in line for line in found), found


def test_keep_every_n_must_be_saved():
    found = problems(
        ["checkpoint.keep_every_n=5", "checkpoint.keep_last_n=1", "checkpoint.save_interval=2"]
    )
    assert found == [
        "checkpoint.keep_every_n=5: is not a multiple of checkpoint.save_interval 2. "
        "Use a multiple."
    ]


def test_a_blend_names_its_validation_sets():
    tree = {**BASE, "data": {**BASE["data"]}}
    del tree["data"]["prefix"]
    tree["data"]["blend"] = [{"prefix": "x/a", "weight": 1}, {"prefix": "y/b", "weight": 3}]
    config = parse_config(yaml.safe_dump(tree))
    assert config.data.valid_sets == {"a": "x/a", "b": "y/b"}
    assert parse_config(config.to_yaml()) == config
    tree["data"]["blend"][1]["prefix"] = "y/a"
    assert "two prefixes end in the same name" in problems([], text=yaml.safe_dump(tree))[0]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_factors_come_from_a_hugging_face_config(tmp_path, key):
    import json

    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "rope_type": "longrope"}
    hf = {key: factors, "original_max_position_embeddings": 48}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    override = f"model.rope_scaling={{hf_config: {tmp_path / 'config.json'}}}"
    config = parse_config(yaml.safe_dump(BASE), [override])
    rope = config.model.rope_scaling
    assert rope.long_factor == (2.0,) * 32 and rope.original_max_position_embeddings == 48
    assert rope.source == str(tmp_path / "config.json")
    # The resolved configuration needs the file no more.
    (tmp_path / "config.json").unlink()
    assert parse_config(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ("[1]", "hf_config="),
        ('{"rope_scaling": {"rope_type": "yarn"}}', "rope_type is yarn, not longrope"),
        ('{"rope_scaling": {"rope_type": "longrope"}}', "has no short_factor"),
        (
            '{"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1], '
            '"original_max_position_embeddings": 8}}',
            "(1 numbers): one for each pair of",
        ),
        (
            '{"rope_scaling": {"rope_type": "longrope", "short_factor": [0], "long_factor": [1], '
            '"original_max_position_embeddings": 8}}',
            "must be greater than 0",
        ),
    ],
)
def test_other_hugging_face_configs_are_refused(tmp_path, hf, expected):
    (tmp_path / "config.json").write_text(hf)
    found = problems([f"model.rope_scaling={{hf_config: {tmp_path / 'config.json'}}}"])
    assert any(expected in line for line in found), found
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["training.precision=fp16", "optimizer.initial_loss_scale=1e-9"],
            "is below the smallest scale, 1 / tokens of a micro-batch = 0.0078125",
        ),
        (
            ["guard.action=rollback", "checkpoint.save_interval=10"],
            "save_interval 10 is not shorter than training.train_iters 10",
        ),
        (["quant.scale_sync=local", "quant.group_size=64"], "has no effect with group_size > 0"),
        (["quant.scale_sync=local", "quant.group_size=tensor"], "no effect with group_size tensor"),
    ],
)
def test_settings_that_contradict_each_other(overrides, expected):
    found = problems(overrides)
    assert len(found) == 1 and expected in found[0], found


def test_full_precision_is_one_key_whatever_the_quantiser():
    for changes in (
        ["quant.activation=int8_per_token", "quant.grid=five"],
        ["quant.group_size=48", "quant.scale_sync=local", "quant.requantize=every_step"],
    ):
        config = parse_config(yaml.safe_dump(BASE), ["quant.enabled=false", *changes])
        assert not config.quant.enabled
