"""Quantising in place after the step equals quantising in every forward, bit for bit."""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers.model_factory import tiny_model
from helpers.ranks import run_ranks
from helpers.tiny_models import TinyRun, tiny_run

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.parallel.requantize.base import Requantizer
from megatron_bitcpm.parallel.scale_sync import update_given_scales

pytestmark = pytest.mark.both_versions

SKIPPED_STEP = 9


def inject_inf(chunk) -> None:
    next(p for p in chunk.parameters() if p.requires_grad).main_grad.view(-1)[0] = float("inf")


def latent_hash(run: TinyRun) -> str:
    digest = hashlib.sha256()
    with run.ternary.latents():
        for site in run.ternary.sites:
            digest.update(site.weight.detach().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def train_once(rank: int, mode: str, steps: int, events: dict, options: dict) -> dict:
    """Train; return every loss and norm in hexadecimal, and the hash of the latent weights."""
    quant = QuantConfig(requantize=mode, **options.pop("quant", {}))
    trace = []
    with tiny_run(quant, **options) as run:
        assert run.ternary.requantizer.mode == mode
        for step in range(steps):
            spoil = inject_inf if step == events.get("skip") else None
            loss, norm, updated = run.train_step(step, spoil)
            assert updated == (spoil is None)
            trace.append((loss, norm))
            if step == events.get("eval"):
                if events.get("toggle_hooks"):
                    run.chunk.disable_forward_pre_hook()
                run.chunk.eval()
                trace.append((run.forward_backward(5000, forward_only=True).hex(), ""))
                run.chunk.train()
                if events.get("toggle_hooks"):
                    run.chunk.enable_forward_pre_hook()
            if step == events.get("save"):
                latent_hash(run)
        return {"trace": trace, "latents": latent_hash(run)}


def both_modes(world: int, steps: int, events: dict, **options) -> tuple[list, list]:
    return tuple(
        run_ranks(world, train_once, mode, steps, events, dict(options))
        for mode in ("every_step", "every_forward")
    )


@pytest.mark.slow
def test_tp2_bf16_with_accumulation_recompute_and_a_skipped_step():
    step, forward = both_modes(
        2,
        50,
        {"skip": SKIPPED_STEP, "save": 20, "eval": 13},
        tp=2,
        micro_batches=4,
        recompute="full",
    )
    assert step == forward
    losses = [float.fromhex(loss) for loss, norm in step[0]["trace"] if norm]
    assert losses[-1] < losses[0] - 0.5, (
        "the model must have learnt for the comparison to mean much"
    )


@pytest.mark.parametrize(
    ("group_size", "overlap"),
    [
        pytest.param(32, True, marks=pytest.mark.slow),
        pytest.param(32, False, marks=pytest.mark.slow),
        pytest.param(-1, True, marks=pytest.mark.slow),
        pytest.param(-1, False, marks=pytest.mark.slow),
    ],
)
def test_dp2_distributed_optimizer(group_size, overlap):
    step, forward = both_modes(
        2,
        16,
        {"skip": SKIPPED_STEP, "eval": 12, "save": 6, "toggle_hooks": overlap},
        distributed_optimizer=True,
        overlap=overlap,
        quant={"group_size": group_size},
        bucket_size=20_000 if overlap else None,
    )
    assert step == forward


SLOW = pytest.mark.slow
TENSOR = {"group_size": "tensor"}
INT8 = {"activation": "int8_per_token"}


@pytest.mark.parametrize(
    ("quant", "overlap"),
    [
        pytest.param(TENSOR, True, marks=SLOW),
        pytest.param({**TENSOR, **INT8}, False, marks=SLOW),
        ({"grid": "ternary"}, False),
        ({"grid": "five"}, False),
        pytest.param({**TENSOR, "grid": "half_sym4", **INT8}, True, marks=SLOW),
        pytest.param({"grid": "asym4", "group_size": 32}, True, marks=SLOW),
        pytest.param({"grid": "int_sym4"}, True, marks=SLOW),
        pytest.param(INT8, False, marks=SLOW),
    ],
)
def test_quantisers(quant, overlap):
    """At tp 2; with overlap at dp 2, where the scales of each bucket group come by themselves."""
    layout = {"distributed_optimizer": True, "overlap": True, "bucket_size": 20_000}
    step, forward = both_modes(
        2,
        10,
        {"skip": SKIPPED_STEP - 5, "save": 6},
        quant=quant,
        recompute="full",
        **(layout if overlap else {"tp": 2}),
    )
    assert step == forward


@pytest.mark.slow
def test_one_scale_per_projection_at_tp2_dp2_with_overlap():
    step, forward = both_modes(
        4,
        10,
        {"skip": SKIPPED_STEP - 5},
        quant={**TENSOR, **INT8},
        tp=2,
        distributed_optimizer=True,
        overlap=True,
        bucket_size=20_000,
    )
    assert step == forward


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_virtual_pipeline_with_distributed_optimizer(overlap):
    """Two chunks on each stage; with overlap the schedule starts each chunk's gather itself."""
    step, forward = both_modes(
        2,
        14,
        {"skip": SKIPPED_STEP, "save": 6},
        pp=2,
        vpp=2,
        micro_batches=4,
        model=tiny_model(num_layers=4),
        distributed_optimizer=True,
        overlap=overlap,
        bucket_size=20_000 if overlap else None,
    )
    assert step == forward


@pytest.mark.slow
def test_pp2_vpp2_dp2_with_overlap():
    step, forward = both_modes(
        4,
        14,
        {"skip": SKIPPED_STEP, "save": 6},
        pp=2,
        vpp=2,
        micro_batches=4,
        model=tiny_model(num_layers=4),
        distributed_optimizer=True,
        overlap=True,
        bucket_size=20_000,
    )
    assert step == forward


@pytest.mark.slow
def test_tp2_dp2_distributed_optimizer_with_overlap():
    step, forward = both_modes(
        4,
        12,
        {"skip": SKIPPED_STEP, "eval": 10, "toggle_hooks": True},
        tp=2,
        distributed_optimizer=True,
        overlap=True,
        bucket_size=20_000,
    )
    assert step == forward


def train_with_naive_hook(rank: int) -> dict:
    """Quantise after every call of step, taken or not."""

    def careless(self, step):
        def followed(*args, **kwargs):
            result = step(*args, **kwargs)
            self._mark_stale()
            self.refresh()
            return result

        return followed

    original, Requantizer._follow_step = Requantizer._follow_step, careless
    try:
        return train_once(rank, "every_step", 14, {"skip": SKIPPED_STEP}, {"tp": 2})
    finally:
        Requantizer._follow_step = original


@pytest.mark.slow
def test_the_comparison_notices_quantising_after_a_skipped_step():
    naive = run_ranks(2, train_with_naive_hook)
    correct = run_ranks(2, train_once, "every_step", 14, {"skip": SKIPPED_STEP}, {"tp": 2})
    same = [a == b for a, b in zip(naive[0]["trace"], correct[0]["trace"], strict=True)]
    assert all(same[: SKIPPED_STEP + 1])
    assert not any(same[SKIPPED_STEP + 1 :])


def weights_around_latents(rank: int) -> tuple[bool, bool, int]:
    """Whether the weights are the main parameters before and inside latents; values after it."""
    with tiny_run(QuantConfig(requantize="every_step"), tp=2) as run:
        run.train_step(0)
        sites = run.ternary.sites

        def are_main() -> bool:
            return all(torch.equal(s.weight.main_param.bfloat16(), s.weight) for s in sites)

        before = are_main()
        with run.ternary.latents():
            inside = are_main()
        return before, inside, max(row.abs().unique().numel() for s in sites for row in s.weight)


def test_latents_are_the_main_parameters_and_quantised_values_return():
    for before, inside, levels in run_ranks(2, weights_around_latents):
        assert not before and inside and levels <= 2


def scales_after_an_edit(rank: int, changes: dict, by: str) -> tuple[bool, bool]:
    """Whether the next forward has the scales of weights that were tripled, and those before."""
    quant = QuantConfig(requantize="every_forward", **changes)
    model = tiny_model(num_layers=1)
    tp = torch.distributed.get_world_size()
    with tiny_run(quant, tp=tp, model=model) as run:
        run.train_step(0)
        run.forward_backward(1, forward_only=True)
        sites = [site for site in run.ternary.sites if site.takes_scales]
        old = [site.scales_OG.clone() for site in sites]
        if by == "load":
            module = run.chunk.module.module
            state = {name: x * 3 for name, x in module.state_dict().items() if x is not None}
            module.load_state_dict(state, strict=False)
        else:
            with run.ternary.latents(), torch.no_grad():
                for site in sites:
                    site.weight.mul_(3.0)
        run.forward_backward(1, forward_only=True)
        used = [(site.scales_OG.clone(), site.fake_quantize(site.weight)) for site in sites]
        for site in sites:
            site.fresh, site.scales_OG = False, None
        update_given_scales(sites)
        fresh = [(site.scales_OG, site.fake_quantize(site.weight)) for site in sites]
        assert sites
        return (
            all(
                torch.equal(a, b)
                for x, y in zip(used, fresh, strict=True)
                for a, b in zip(x, y, strict=True)
            ),
            any(torch.equal(a, b) for a, (b, _) in zip(old, used, strict=True)),
        )


@pytest.mark.parametrize(
    ("tp", "changes", "by"),
    [(1, TENSOR, "latents"), (2, {}, "latents"), (1, TENSOR, "load")],
)
def test_scales_follow_an_edit_of_the_weights(tp, changes, by):
    for current, kept in run_ranks(tp, scales_after_an_edit, changes, by):
        assert current and not kept
