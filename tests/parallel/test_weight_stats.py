"""The statistics of layers against numpy on the gathered, unsharded weights of all ranks."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers.model_factory import tiny_model
from helpers.ranks import run_ranks
from helpers.tiny_models import tiny_run
from megatron.core import parallel_state

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.parallel import weight_stats
from megatron_bitcpm.parallel.weight_stats import CodeSampler

pytestmark = pytest.mark.both_versions

SKIPPED_STEP, STEPS = 2, 4


def spoil_gradients(chunk) -> None:
    next(p for p in chunk.parameters() if p.requires_grad).main_grad.fill_(float("nan"))


def gemm_weights(run) -> dict[str, np.ndarray]:
    """The matrices that the GEMMs of the next forward get: the truth about codes."""
    seen = {}
    requantizer = run.ternary.requantizer
    original = requantizer.weight_for_forward

    def recording(site, weight):
        result = original(site, weight)
        seen[site.name] = result.detach().float().numpy().copy()
        return result

    requantizer.weight_for_forward = recording
    try:
        run.forward_backward(5000, forward_only=True)
    finally:
        requantizer.weight_for_forward = original
    return seen


def latent_weights(run) -> dict[str, np.ndarray]:
    with run.ternary.latents():
        return {s.name: s.weight.detach().float().numpy().copy() for s in run.ternary.sites}


def watch(rank: int, mode: str, changes: dict, options: dict) -> dict:
    """Statistics after each step, with the latents and the weights of the forward after it."""
    quant = QuantConfig(requantize=mode, **changes)
    with tiny_run(quant, lr=2e-2, **options) as run:
        assert run.ternary.requantizer.mode == mode
        sampler = CodeSampler(run.ternary)
        looks = []
        for step in range(STEPS):
            run.train_step(step, spoil_gradients if step == SKIPPED_STEP else None)
            statistics = sampler.measure()
            looks.append((statistics, latent_weights(run), gemm_weights(run)))
        return {
            "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
            "dp_rank": parallel_state.get_data_parallel_rank(),
            "row_parallel": {site.name: site.row_parallel for site in run.ternary.sites},
            "looks": looks,
        }


def join(ranks: list[dict], look: int, which: int) -> dict[str, np.ndarray]:
    """The full matrices of one look, by global name, from the shards of one replica."""
    shards: dict[str, list] = {}
    axes = {}
    for rank in sorted((r for r in ranks if r["dp_rank"] == 0), key=lambda r: r["tp_rank"]):
        for name, shard in rank["looks"][look][which].items():
            shards.setdefault(name, []).append(shard)
            axes[name] = 1 if rank["row_parallel"][name] else 0
    return {name: np.concatenate(parts, axes[name]) for name, parts in shards.items()}


def flat(matrices: dict[str, np.ndarray], layer: str) -> np.ndarray:
    return np.concatenate(
        [w.ravel() for name, w in sorted(matrices.items()) if f"layers.{layer}" in name]
    )


def expected_mean_scale(latents: dict[str, np.ndarray], layer: str) -> float:
    """The mean over weights of the mean |w| of their group is the mean |w|, for any groups."""
    return np.abs(flat(latents, layer).astype(np.float64)).mean()


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "dp2-distributed": (2, {"distributed_optimizer": True}),
    "dp2-overlap": (2, {"distributed_optimizer": True, "overlap": True, "bucket_size": 20_000}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2, "fill": True}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2, "fill": True}),
}


FAST = {
    ("one", "every_step"),
    ("one", "every_forward"),
    ("pp2-vpp2", "every_forward"),
}


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in product(LAYOUTS, ("every_step", "every_forward"))
    ],
)
def test_statistics_are_those_of_the_weights_in_the_forward(layout, mode):
    world, options = LAYOUTS[layout]
    group_size = 32 if layout == "dp2-overlap" else -1
    model = tiny_model(num_layers=4 if "pp2" in layout else 2)
    ranks = run_ranks(world, watch, mode, {"group_size": group_size}, {**options, "model": model})
    before = None
    for look in range(STEPS):
        statistics = ranks[0]["looks"][look][0]
        assert all(rank["looks"][look][0] == statistics for rank in ranks)
        assert list(statistics.layers) == list(range(model.num_layers))
        latents, quantised = join(ranks, look, 1), join(ranks, look, 2)
        for number, found in [("", statistics.total), *statistics.layers.items()]:
            layer = f"{number}." if number != "" else ""
            w, wq = flat(latents, layer), flat(quantised, layer)
            codes = np.sign(wq)
            assert found.zero_fraction == (codes == 0).mean()
            if before is None:
                assert found.flip_fraction is None
            else:
                assert found.flip_fraction == (codes != np.sign(flat(before, layer))).mean()
            # Sums of float32 in another order.
            expected = expected_mean_scale(latents, layer)
            assert found.mean_scale == pytest.approx(expected, rel=1e-5)
            error = np.linalg.norm(w - wq) / np.linalg.norm(w)
            assert found.quant_error == pytest.approx(error, rel=1e-5)
        before = quantised
    flips = [rank_look[0].total.flip_fraction for rank_look in ranks[0]["looks"]]
    assert flips[SKIPPED_STEP] == 0 and flips[1] > 0 and flips[3] > 0


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"group_size": "tensor"}, "tp2"),
        ({"grid": "five"}, "one"),
        pytest.param({"grid": "half_sym4"}, "tp2", marks=pytest.mark.slow),
        pytest.param({"grid": "int_sym4", "group_size": "tensor"}, "one", marks=pytest.mark.slow),
    ],
)
def test_statistics_of_other_quantisers(changes, layout):
    world, options = LAYOUTS[layout]
    ranks = run_ranks(world, watch, "every_step", changes, options)
    before = None
    for look in range(STEPS):
        found = ranks[0]["looks"][look][0].total
        latents, quantised = join(ranks, look, 1), join(ranks, look, 2)
        w, wq = flat(latents, ""), flat(quantised, "")
        codes = flat({name: levels(matrix) for name, matrix in quantised.items()}, "")
        assert found.zero_fraction == (codes == 0).mean()
        if before is not None:
            assert found.flip_fraction == (codes != before).mean()
        assert found.quant_error == pytest.approx(np.linalg.norm(w - wq) / np.linalg.norm(w), 1e-5)
        if "grid" not in changes:
            assert found.mean_scale == pytest.approx(expected_mean_scale(latents, ""), rel=1e-5)
        elif "group_size" not in changes:
            divisor = 2 if changes["grid"] == "five" else 1.5
            scales = {n: np.abs(m).max(1, keepdims=True) + 0 * m for n, m in latents.items()}
            assert found.mean_scale == pytest.approx(flat(scales, "").mean() / divisor, rel=1e-5)
        before = codes


def levels(wq: np.ndarray) -> np.ndarray:
    """Which of the few values of its row each weight has: a number that stands for its level."""
    magnitudes = np.abs(wq)
    ranks = [np.unique(row, return_inverse=True)[1] for row in magnitudes]
    has_zero = (magnitudes == 0).any(1, keepdims=True)
    return (np.array(ranks) + ~has_zero) * np.sign(wq)


def losses(rank: int, looking: bool, options: dict) -> list[tuple]:
    with tiny_run(QuantConfig(requantize="every_step"), **options) as run:
        sampler = CodeSampler(run.ternary)
        trace = []
        for step in range(6):
            trace.append(run.train_step(step, spoil_gradients if step == 3 else None))
            if looking:
                sampler.measure()
        return trace


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "dp2-distributed", "dp2-overlap"])
def test_looking_does_not_change_the_training(layout):
    world, options = LAYOUTS[layout]
    assert run_ranks(world, losses, True, options) == run_ranks(world, losses, False, options)


def sample_sizes(rank: int, limit: int) -> tuple[list[int], list[bool]]:
    weight_stats.MAX_WEIGHTS = limit
    with tiny_run(QuantConfig(), tp=2) as run:
        sampler = CodeSampler(run.ternary)
        run.train_step(0)
        sampler.measure()
        first = list(sampler._codes_before.values())
        sampler.measure()
        again = list(sampler._codes_before.values())
        same = [torch.equal(a, b) for a, b in zip(first, again, strict=True)]
        return [codes.numel() for codes in first], same


def test_the_sample_is_bounded_over_linears_and_ranks_and_stays_the_same():
    ranks = run_ranks(2, sample_sizes, 20_000)
    for sizes, same in ranks:
        assert all(same)
        # Two layers of four linears, each cut to whole rows of its share on this rank.
        assert len(sizes) == 8 and all(0 < size <= 20_000 // (4 * 2) for size in sizes)
    assert max(ranks[0][0]) > 2_000


def statistics_of_a_spoilt_model(rank: int) -> tuple[float, float, float]:
    with tiny_run(QuantConfig(requantize="every_forward"), dtype=torch.float32) as run:
        run.ternary.sites[0].weight.data[0, 0] = math.nan
        found = CodeSampler(run.ternary).measure().layers
        return found[0].zero_fraction, found[0].quant_error, found[1].quant_error


def test_a_weight_that_is_not_finite_shows_in_its_layer_alone():
    zeros, error, other = run_ranks(1, statistics_of_a_spoilt_model)[0]
    assert 0 < zeros < 1 and math.isnan(error) and 0.2 < other < 0.8
