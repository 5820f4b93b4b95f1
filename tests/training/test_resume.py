"""Which settings a resumed run may change; each answer is a decision, not a computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.model_factory import tiny_fields

from megatron_bitcpm.config import RunConfig, parse_config
from megatron_bitcpm.errors import ConfigError
from megatron_bitcpm.training.resume import check_resumable

FOLDER = Path("run/iter_0000004")


def run_config(**changes) -> RunConfig:
    """A run on four ranks; changes are ``section__key=value``."""
    tree: dict = {
        "model": tiny_fields("run", num_layers=4, num_query_groups=4),
        "quant": {},
        "parallel": {"tensor_model_parallel_size": 1},
        "data": {"prefix": "d", "tokenizer": "t", "seq_length": 32},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 10, "micro_batch_size": 1, "global_batch_size": 8},
        "checkpoint": {"directory": "run", "save_interval": 5},
    }
    for path, value in changes.items():
        section, key = path.split("__", 1)
        tree.setdefault(section, {})[key] = value
    return parse_config(yaml.safe_dump(tree), world_size=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__tensor_model_parallel_size": 2},
        {"parallel__pipeline_model_parallel_size": 2},
        {"parallel__context_parallel_size": 2},
        {"training__micro_batch_size": 2, "training__train_iters": 20},
        {"training__recompute": "full", "training__log_interval": 3},
        {"optimizer__lr": 1e-4, "optimizer__weight_decay": 0.0},
        {"quant__requantize": "every_forward", "quant__backend": "reference"},
        {"data__prefix": "elsewhere", "data__tokenizer": "moved"},
        {"checkpoint__keep_last_n": 2, "checkpoint__async_save": True},
    ],
    ids=" ".join,
)
def test_what_may_change(changes):
    check_resumable(run_config(**changes), run_config(), FOLDER)


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        # A part of `parallel`, but not of the layout: the state has another form.
        ("parallel.use_distributed_optimizer", True, False),
        ("model.num_layers", 2, 4),
        ("model.hidden_size", 128, 64),
        ("quant.group_size", 32, -1),
        ("quant.enabled", False, True),
        ("training.global_batch_size", 4, 8),
        ("training.seed", 3, run_config().training.seed),
        ("training.precision", "fp32", "bf16"),
        ("data.seq_length", 16, 32),
    ],
)
def test_what_must_stay(key, value, before):
    changed = {key.replace(".", "__"): value}
    if key == "training.precision":
        changed["quant__requantize"] = "auto"
    with pytest.raises(ConfigError) as error:
        check_resumable(run_config(**changed), run_config(), FOLDER)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{key}={value}: the checkpoint iter_0000004 was trained with {before}.")


@pytest.mark.parametrize(
    ("quant", "is_refused"),
    [
        ({"scale_sync": "local"}, True),
        ({"scale_sync": "exact"}, False),
        ({"activation": "int8_per_token"}, True),
        ({"group_size": "tensor"}, False),
    ],
)
def test_scales_of_shards_hold_the_tensor_parallel_size(quant, is_refused):
    changes = {f"quant__{key}": value for key, value in quant.items()}
    two, four = (run_config(**changes, parallel__tensor_model_parallel_size=tp) for tp in (2, 4))
    check_resumable(two, two, FOLDER)
    if not is_refused:
        return check_resumable(four, two, FOLDER)
    with pytest.raises(ConfigError) as error:
        check_resumable(four, two, FOLDER)
    message = str(error.value)
    assert message.startswith("parallel.tensor_model_parallel_size=4: the checkpoint iter_0000004")
