import json

import pytest

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.evaluation.bench_ops import bench_ops


def test_bench_reports_medians_ratios_and_differences(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    report = json.loads(json.dumps(bench_ops(64, 256, group_size=64, rounds=3)))
    medians = report["median_ms"]
    assert medians["compiled"] is None
    assert report["unavailable"] == {"compiled": "TORCHDYNAMO_DISABLE is set"}
    assert all(medians[name] > 0 for name in ("eager", "reference", "quantize"))
    ratio = report["ratio"]["eager/fake_quantize"]
    assert ratio == pytest.approx(medians["eager"] / medians["fake_quantize"], rel=0.2)
    assert report["elements"] == 64 * 256
    assert report["differing_elements"]["reference"] == 0
    assert report["machine"]["threads"] >= 1


def test_bench_refuses_a_wrong_dtype():
    with pytest.raises(BitcpmError, match=r"dtype=int8: is not supported. Use bfloat16"):
        bench_ops(dtype="int8")
