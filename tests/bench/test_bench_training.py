"""The measurements on training steps report what they say; no times are judged."""

from __future__ import annotations

import json
import math

import pytest
from helpers.ranks import run_ranks

from megatron_bitcpm.bench import train
from megatron_bitcpm.bench.save import bench_save
from megatron_bitcpm.bench.timing import ratios
from megatron_bitcpm.errors import ConfigError


def measure(rank: int) -> list[dict]:
    """Both, on steps of one short micro-batch."""
    train.MICRO_BATCHES, train.SEQ_LENGTH = 1, 32
    return [train.bench_train(10), bench_save(2)]


@pytest.mark.slow
def test_steps_and_saves():
    steps, saves = json.loads(json.dumps(run_ranks(1, measure)[0]))
    modes = ["every_step", "every_forward"]
    assert list(steps["step_s"]) == ["full_precision", *modes]
    assert all(0 < steps["operator_share"][mode] < 1 for mode in modes)
    for mode in modes:
        interval = steps["time_ratio_to_full_precision"][mode]
        assert 0 < interval["low_95"] <= interval["ratio"] <= interval["high_95"]
    assert steps["shapes"]["vocab_size"] == train.VOCAB_SIZE

    assert list(saves["sync"]) == ["stall_s", "write_s"]
    assert list(saves["async"]) == ["stall_s", "write_s", "step_s"]
    assert saves["megabytes"] > 400  # weights and moments of 31 million parameters
    assert min(saves["step_s"], saves["stall_ratio"], *saves["sync"].values()) > 0


def test_the_interval_is_students_on_logarithms():
    powers = [0.0, 1.0] * 5
    found = train._interval([math.exp(power) for power in powers])
    # By hand: mean 0.5, deviation sqrt(10 / 4 / 9), 9 degrees of freedom.
    half = 2.262 * math.sqrt(10 / 4 / 9) / math.sqrt(10)
    wanted = {"ratio": 0.5, "low_95": 0.5 - half, "high_95": 0.5 + half}
    assert found == pytest.approx({name: math.exp(power) for name, power in wanted.items()})


def test_ratios_are_of_the_rounds_that_both_have():
    assert ratios([2.0, 9.0, 5.0], [1.0, 3.0]) == [2.0, 3.0]


def test_too_few_rounds():
    with pytest.raises(ConfigError, match=r"^--pairs=9: is too few"):
        train.bench_train(9)
    with pytest.raises(ConfigError, match=r"^--rounds=1: gives no median"):
        bench_save(1)
