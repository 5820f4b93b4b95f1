"""Which runs may lend their weights to another."""

from __future__ import annotations

import copy

import pytest
import yaml
from helpers.checkpoint_cases import CONFIG

from megatron_bitcpm.checkpoint.init_from import check_init_from
from megatron_bitcpm.config import parse_config
from megatron_bitcpm.errors import ConfigError


def config(**changes):
    tree = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return parse_config(yaml.safe_dump(tree), world_size=2)


@pytest.mark.parametrize(
    "change",
    [
        {"parallel__tensor_model_parallel_size": 2},
        {"training__precision": "fp32"},
        {"quant__enabled": False},
        {"quant__group_size": 32},
        {"model__max_position_embeddings": 64},
        {"model__kv_channels": 16},  # what hidden_size / num_attention_heads is anyway
        {"model__init_method_std": 0.5},
        {"optimizer__lr": 1.0},
    ],
)
def test_what_may_differ(change, tmp_path):
    check_init_from(config(**change), config().model, tmp_path)
    check_init_from(config(), config(**change).model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__num_layers": 2}, r"model\.num_layers=2: checkpoint\.init_from .* has 4\."),
        ({"model__kv_channels": 32}, r"model\.kv_channels=32: .* has 16\."),
        ({"model__rotary_base": 500}, r"model\.rotary_base=500: .* has 10000\."),
        (
            {"model__share_embeddings_and_output_weights": True},
            r"share_embeddings_and_output_weights=True: .* has False\.",
        ),
    ],
)
def test_another_architecture(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        check_init_from(config(**change), config().model, tmp_path)
    assert len(caught.value.problems) == 1
