"""The released sizes: their configurations load, and build to the published parameter counts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.model_factory import TIED, tiny_model

from megatron_bitcpm.arch.counts import count_parameters, count_ternary_linears
from megatron_bitcpm.arch.layout import Layout, pad_rows
from megatron_bitcpm.config import ParallelConfig, QuantConfig, load_config

pytestmark = pytest.mark.both_versions

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
VOCAB = 73448
# Name: parameters as published, ranks of the configuration.
RELEASED = {"0.5b": (433.8e6, 8), "1b": (1.622e9, 8), "3b": (3.606e9, 16), "8b": (8.185e9, 16)}
RANKS = {"demo": 2} | {f"bitcpm-{size}": ranks for size, (_, ranks) in RELEASED.items()}


def ranks_of(path: Path) -> int:
    """The world size that a configuration is meant for; its first lines may say it."""
    said = re.search(r"^# Ranks: (\d+)$", path.read_text(), re.MULTILINE)
    return int(said[1]) if said else RANKS.get(path.stem, 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads_at_its_world_size(path):
    config = load_config(path, world_size=ranks_of(path))
    if path.stem in RANKS:
        assert ranks_of(path) == RANKS[path.stem]
    assert config.parallel.tensor_model_parallel_size <= 2


def test_no_released_configuration_is_missing():
    assert {f"bitcpm-{size}" for size in RELEASED} <= {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes_build_on_meta_with_the_published_count(size):
    from megatron_bitcpm.models.decoder import Decoder, build_transformer_config
    from megatron_bitcpm.training.runtime import start_runtime

    published, ranks = RELEASED[size]
    model = load_config(CONFIGS / f"bitcpm-{size}.yaml", world_size=ranks).model
    formula = count_parameters(model, VOCAB)
    assert formula == pytest.approx(published, rel=1e-3)
    assert pad_rows(VOCAB, model.make_vocab_size_divisible_by) == VOCAB
    with start_runtime(ParallelConfig(), 0), torch.device("meta"):
        config = build_transformer_config(model, ParallelConfig(), torch.bfloat16)
        built = Decoder(config, model, VOCAB, 4096)
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert sum(p.numel() for p in built.parameters()) == formula


def test_the_program_prints_the_table():
    paths = [str(CONFIGS / f"bitcpm-{size}.yaml") for size in RELEASED]
    command = [sys.executable, "-m", "megatron_bitcpm.arch.counts", *paths]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert [name for name, _ in lines] == [f"bitcpm-{size}" for size in RELEASED]
    for (_, count), (published, _) in zip(lines, RELEASED.values(), strict=True):
        assert int(count.replace(",", "")) == pytest.approx(published, rel=1e-3)


def test_counts_by_hand():
    # Layer: qkv 8 x (8 + 2 * 4) = 128, out 8 x 8 = 64, mlp 3 * 8 * 16 = 384, norms 16: 592.
    assert count_parameters(tiny_model("deep", num_layers=1), 10) == 592 + 8 + 2 * 80
    assert count_parameters(tiny_model("deep", **TIED), 10) == 8 * 592 + 8 + 80
    # Heads of 6 channels: qkv 8 x (12 + 12) = 192, out 12 x 8 = 96.
    wide = tiny_model("deep", num_layers=1, kv_channels=6)
    assert count_parameters(wide, 10) == 592 + 96 + 8 + 160


def test_layers_and_ternary_linears_of_stages_by_hand():
    model = tiny_model("deep")
    rounds = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert Layout().layers_of_stage(model, 0) == list(range(8))
    assert Layout(pp=2).layers_of_stage(model, 1) == [4, 5, 6, 7]
    assert rounds.layout.layers_of_stage(model, 0) == [0, 1, 4, 5]
    assert rounds.layout.layers_of_stage(model, 1) == [2, 3, 6, 7]
    quant = QuantConfig(full_precision_last_layers=1, exclude=("decoder.layers.2.mlp.*",))
    assert count_ternary_linears(model, quant.excludes) == 4 * 7 - 2
    assert count_ternary_linears(model, quant.excludes, [0, 1, 4, 5]) == 16
    assert count_ternary_linears(model, quant.excludes, [2, 3, 6, 7]) == 16 - 4 - 2


def test_the_vocabulary_is_padded_to_the_multiple():
    assert pad_rows(VOCAB, tiny_model("deep").make_vocab_size_divisible_by) == 73472
    assert pad_rows(128, 128) == 128
