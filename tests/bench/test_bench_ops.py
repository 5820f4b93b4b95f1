import json

import pytest
import torch

from megatron_bitcpm.bench import ops as bench
from megatron_bitcpm.bench.ops import bench_ops
from megatron_bitcpm.bench.ops_cases import list_candidates
from megatron_bitcpm.bench.timing import interleave, time_interleaved
from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.ops import _cpu
from megatron_bitcpm.ops._schema import SCHEMAS


def test_report_of_medians_ratios_limits_and_differences(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    report = json.loads(json.dumps(bench_ops(64, 256, "bfloat16", 64, 3)))
    medians = report["median_ms"]
    assert medians.pop("compiled") is None
    assert report["unavailable"] == {"compiled": "TORCHDYNAMO_DISABLE is set"}
    assert all(value > 0 for value in medians.values())
    assert report["elements"] == 64 * 256
    assert report["differing_elements"]["reference"] == 0
    assert report["machine"]["threads"] == torch.get_num_threads()
    for name, limit in bench.LIMITS.items():
        found = report["limits"][name]
        assert found == {"ratio": report["ratio"][name], "limit": limit, "met": None}
    threads = report["limits"]["kernel threads 1->2"]
    assert threads["ratio"] == report["threads"]["float16"]["kernel_gain"]
    met = None if threads["ratio"] is None else threads["ratio"] >= threads["limit"]
    assert threads["met"] is met
    isas = _cpu.native.supported_isas() if _cpu.native else []
    assert list(report["isa_median_ms"]) == isas
    assert report["machine"]["isa"] == _cpu.isa  # the choice is restored
    assert all(case["gain"] > 0 for case in report["threads"].values())
    assert list(report["threads"]) == ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize(
    ("shape", "dtype", "met"),
    [
        ((4096, 4096), "bfloat16", True),
        ((4096, 4096), "float32", None),
        ((4096, 2048), "bfloat16", None),
    ],
)
def test_limits_are_for_one_case(shape, dtype, met, monkeypatch):
    ratios = {"fake_quantize/clone": 1.0, "fake_quantize_/mul_": 1.5, "pack2/clone_of_half": 1.0}
    monkeypatch.setattr(bench, "_make_weight", lambda *_: torch.randn(8, 256))
    monkeypatch.setattr(bench, "_find_ratios", lambda times_s, names: dict(ratios))
    threads = {bench.THREADS_DTYPE: {"kernel_gain": None}}
    monkeypatch.setattr(bench, "_measure_threads", lambda *_: threads)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    limits = bench_ops(*shape, dtype, -1, 1)["limits"]
    assert limits["fake_quantize/clone"]["met"] is met
    assert limits["fake_quantize_/mul_"]["met"] is (None if met is None else False)


TIMES_S = {"1": [3.0, 4.0], "2": [2.0, 2.0], "kernel 1": [3.0], "kernel 2": [2.0]}


def test_threads_are_compared_on_a_tensor_that_one_core_keeps_in_its_cache(monkeypatch):
    monkeypatch.setattr(bench, "_find_l2_bytes", lambda: 1 << 20)
    monkeypatch.setattr(bench, "time_threads", lambda *_: TIMES_S)
    threads = bench._measure_threads(-1, 2)
    shapes = {"float32": [192, 1024], "bfloat16": [384, 1024], "float16": [384, 1024]}
    assert {dtype: case["shape"] for dtype, case in threads.items()} == shapes
    assert threads["float32"]["gain"] == 1.75
    assert threads["float32"]["kernel_gain"] == 1.5


def test_every_operator_and_grid_is_timed():
    names = set(list_candidates(torch.randn(8, 256), 64))
    assert set(SCHEMAS) <= names
    assert {f"fake_quantize {g}" for g in ("asym4", "half_sym4", "int_sym4", "five")} <= names


def test_ratios_pair_the_timings_of_a_round():
    times_s = {"clone": [1.0, 10.0], "fake_quantize": [2.0, 20.0], "reference": [6.0]}
    ratios = bench._find_ratios(times_s, ("fake_quantize/clone", *bench.TORCH_RATIOS))
    assert ratios["fake_quantize/clone"] == 2.0
    assert ratios["reference/fake_quantize"] == 3.0
    assert "compiled/fake_quantize" not in ratios


def test_rounds_interleave():
    order = []
    candidates = {n: lambda n=n: order.append(n) for n in ("a", "b")}
    times_s = time_interleaved(candidates, rounds=2)
    assert order == ["a", "b"] * 3  # the first round warms up
    assert {name: len(values) for name, values in times_s.items()} == {"a": 2, "b": 2}
    order.clear()
    interleave(candidates, rounds=2, alternate=True)
    assert order == ["b", "a", "a", "b", "b", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, r"dtype=int8: is not supported. Use bfloat16"),
        ({"rounds": 0}, r"rounds=0: must be at least 1. Use 31"),
        ({"in_features": 100, "group_size": 64}, r"group_size=64: in_features 100 is not a mult"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"out_features": 8, "in_features": 4096, "dtype": "bfloat16", "group_size": -1}
    with pytest.raises(BitcpmError, match=message):
        bench_ops(**good | {"rounds": 31} | arguments)
