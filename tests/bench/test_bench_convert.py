"""The benchmark of conversions runs every case and reports what it says; no times are judged."""

from __future__ import annotations

import json
import math

import pytest

from megatron_bitcpm.arch.model import shapes_of
from megatron_bitcpm.bench.convert import CASES, ROOM, bench_convert, run_sampled
from megatron_bitcpm.bench.random_model import SHAPES, make_model
from megatron_bitcpm.conversion.verify import verify
from megatron_bitcpm.errors import BitcpmError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A plain folder and one of latents, tiny."""
    root = tmp_path_factory.mktemp("bench")
    sizes = make_model(root / "hf", root / "hf_latent", *SHAPES["tiny"])
    return root / "hf", root / "hf_latent", sizes


def test_the_model_is_sound(models):
    plain, latent, (largest, total) = models
    assert verify(plain)["form"] == "plain"
    report = verify(latent)
    assert (report["form"], report["ternary_tensors"]) == ("latent", 14)
    assert largest == 2 * 512 * 64
    assert total == 2 * (report["weights"] + report["other_parameters"])
    assert 0.2 < report["zero_fraction"] < 0.4  # of normal weights: 0.31


def test_the_shape_of_the_default_is_the_released_one():
    size = sum(math.prod(shape) for shape in shapes_of(*SHAPES["1B"]).values())
    assert round(size / 1e9, 3) == 1.622


@pytest.mark.slow
def test_a_conversion_in_a_process_of_its_own(models, tmp_path):
    times, peak = run_sampled(str(models[0]), str(tmp_path / "out"), {"form": "plain"})
    assert 0 < times["verify_seconds"] < times["total_seconds"]
    # Python with torch and the model: more than 50 MB, less than the limit of the smallest model.
    assert 50e6 < peak < 2 * models[2][0] + ROOM
    verify(tmp_path / "out", models[0])


@pytest.mark.slow
def test_a_failed_conversion_is_one_line(models, tmp_path):
    with pytest.raises(
        BitcpmError, match=r"^output=.*: .*form=latent: .* which quantiser"
    ) as caught:
        run_sampled(str(models[0]), str(tmp_path / "out"), {"form": "latent"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "9B"}, "^shape=9B: is unknown. Use 1B, small, tiny"),
        ({"rounds": 0}, "^rounds=0: measures nothing"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(BitcpmError, match=message):
        bench_convert(**options)


@pytest.mark.slow
def test_all_conversions(tmp_path):
    report = bench_convert("tiny", rounds=1, cold=True, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert json.loads(json.dumps(report)) == report
    assert list(report["cases"]) == [case.name for case in CASES]
    assert len(report["dd_mb_per_s"]) == len(CASES) + 1
    for name, case in report["cases"].items():
        (run,) = case["runs"]
        mean = (run["dd_before_mb_per_s"] + run["dd_after_mb_per_s"]) / 2
        assert case["ratio"] == pytest.approx(run["mb_per_s"] / mean, abs=1e-3)
        assert case["min_ratio"] == (0.25 if "quantizing" in name else 0.5)
        megatron = name in ("hf_to_torch_dist", "hf_to_legacy")
        size = case["shard_bytes"] if megatron else 2 * report["largest_tensor_bytes"]
        assert case["limit_bytes"] == size + 10**9
        assert 0 < case["peak_anonymous_bytes"] < case["limit_bytes"]
