"""Optimizer states survive a resume, in the same and in another layout."""

from __future__ import annotations

import pytest
import torch
from helpers.model_factory import tiny_model
from helpers.ranks import run_ranks
from helpers.tiny_models import TinyRun, tiny_run

from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.parallel import optimizer_parts, optimizer_state
from megatron_bitcpm.parallel.megatron_api import sharded_state_dict_of_chunks
from megatron_bitcpm.parallel.optimizer_state import (
    guard_padded_buckets,
    optimizer_sharded_state_dict,
)
from megatron_bitcpm.patching.core import megatron_patches

pytestmark = pytest.mark.both_versions

SAVED_AT, STEPS = 4, 4
GLOBAL_MICRO_BATCHES = 12


def unwrap(chunk) -> torch.nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def state_dict(run: TinyRun, is_loading: bool) -> dict:
    model = sharded_state_dict_of_chunks([unwrap(chunk) for chunk in run.chunks])
    return {**model, "optimizer": optimizer_sharded_state_dict(run.optimizer, model, is_loading)}


def save(run: TinyRun, folder: str) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(state_dict(run, is_loading=False), folder)


def load(run: TinyRun, folder: str) -> None:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(state_dict(run, is_loading=True), folder)
    for index, chunk in enumerate(run.chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"])
    run.optimizer.load_state_dict(loaded["optimizer"])


def layout(options: dict, world: int) -> dict:
    dp = world // (options.get("tp", 1) * options.get("pp", 1))
    return {
        "model": tiny_model(num_layers=4),
        "micro_batches": GLOBAL_MICRO_BATCHES // dp,
        **options,
    }


def train(run: TinyRun, first: int) -> list[tuple[float, float]]:
    trace = []
    for step in range(first, first + STEPS):
        loss, norm, updated = run.train_step(step)
        assert updated
        trace.append((float.fromhex(loss), float.fromhex(norm)))
    return trace


def train_and_save(rank: int, folder: str, world: int, options: dict, mutant: str = "") -> list:
    """Train, save, go on; return the losses and norms after the save."""
    mutate(mutant)
    with tiny_run(None, **layout(options, world)) as run:
        train(run, 0)
        save(run, folder)
        return train(run, SAVED_AT)


def resume(rank: int, folder: str, world: int, options: dict, mutant: str = "") -> tuple:
    """Resume; return the losses and norms, and the different values of Adam's step at the end."""
    mutate(mutant)
    with tiny_run(None, seed=99, **layout(options, world)) as run:
        load(run, folder)
        return train(run, SAVED_AT), adam_steps(run)


def adam_steps(run: TinyRun) -> list[float]:
    leaf = run.optimizer.chained_optimizers[0]
    return sorted({float(state["step"]) for state in leaf.optimizer.state.values()})


def mutate(mutant: str) -> None:
    """Take one guard out of this process; ranks are processes of their own."""
    if mutant == "adam step":
        optimizer_parts._unshare_steps = lambda optimizer: None
    elif mutant == "gather":
        optimizer_state.gather_model_params = lambda optimizer: None
    elif mutant:
        unpatch(mutant)


def unpatch(part_of_target: str) -> None:
    (patch,) = [p for p in megatron_patches().patches if part_of_target in p.target]
    holder, name = patch.resolve()
    setattr(holder, name, getattr(holder, name).__wrapped__)


def is_listed(part_of_target: str) -> bool:
    return any(part_of_target in patch.target for patch in megatron_patches().patches)


DDP = {}
DISTRIBUTED = {"distributed_optimizer": True}
PADDED = {**DISTRIBUTED, "overlap": True, "bucket_size": 10_000}
LAYOUTS = {
    "ddp dp1": (1, DDP),
    "ddp tp2": (2, {**DDP, "tp": 2}),
    "ddp pp2": (2, {**DDP, "pp": 2}),
    "ddp pp2 vpp2": (2, {**DDP, "pp": 2, "vpp": 2}),
    "dist dp1": (1, DISTRIBUTED),
    "dist dp2 padded": (2, PADDED),
    "dist dp3 padded": (3, PADDED),
    "dist dp2 fp32": (2, {**PADDED, "dtype": torch.float32}),
    "ddp tp2 fp32": (2, {"tp": 2, "dtype": torch.float32}),
    "dist tp2": (2, {**DISTRIBUTED, "tp": 2}),
    "dist pp2": (2, {**DISTRIBUTED, "pp": 2}),
    "dist pp2 vpp2 overlap": (2, {**PADDED, "pp": 2, "vpp": 2}),
}
ROUTES = [
    ("ddp tp2", ["ddp tp2", "ddp pp2"]),
    ("ddp pp2 vpp2", ["ddp pp2 vpp2", "ddp tp2"]),
    ("dist dp3 padded", ["dist dp3 padded", "dist dp2 padded", "dist pp2"]),
    ("dist pp2 vpp2 overlap", ["dist pp2 vpp2 overlap", "dist tp2"]),
    ("dist dp2 fp32", ["dist dp2 fp32"]),
    ("ddp tp2 fp32", ["ddp tp2 fp32"]),
    ("dist tp2", ["dist pp2 vpp2 overlap"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "targets"),
    ROUTES,
    ids=[source for source, _ in ROUTES],
)
def test_resume_in_the_same_and_in_other_layouts(tmp_path, source, targets):
    world, options = LAYOUTS[source]
    went_on = run_ranks(world, train_and_save, str(tmp_path), world, options)[0]
    for target in targets:
        world, options = LAYOUTS[target]
        resumed, steps = run_ranks(world, resume, str(tmp_path), world, options)[0]
        assert steps == [SAVED_AT + STEPS], target
        if target == source:
            assert resumed == went_on
        else:
            close = [[pytest.approx(value, rel=2e-3) for value in pair] for pair in went_on]
            assert resumed == [tuple(pair) for pair in close], target


@pytest.mark.slow
def test_adam_steps_are_shared_without_the_guard(tmp_path):
    world, options = LAYOUTS["dist dp2 padded"]
    went_on = run_ranks(world, train_and_save, str(tmp_path), world, options)[0]
    assert run_ranks(world, resume, str(tmp_path), world, options)[0] == (went_on, [8.0])
    spoilt, steps = run_ranks(world, resume, str(tmp_path), world, options, "adam step")[0]
    assert len(steps) == 1 and steps[0] > 20, "Megatron shares the step no more: drop the guard"
    assert spoilt[0] == went_on[0], "the first losses come before a step"
    assert spoilt[1] != went_on[1]


@pytest.mark.slow
def test_padded_buckets_are_saved_shifted_without_the_correction(tmp_path):
    world, options = LAYOUTS["dist dp3 padded"]
    saves_shifted = is_listed("fully_reshardable")
    mutant = "fully_reshardable" if saves_shifted else ""
    went_on = run_ranks(world, train_and_save, str(tmp_path), world, options, mutant)[0]
    resumed, _ = run_ranks(world, resume, str(tmp_path), world, options)[0]
    assert resumed[0][0] == went_on[0][0], "the model's own weights are right"
    if saves_shifted:
        assert abs(resumed[1][0] - went_on[1][0]) > 0.1
    else:
        assert resumed == went_on, "this release needs the correction too"


@pytest.mark.slow
def test_parameters_are_saved_incomplete_without_the_gather(tmp_path):
    world, options = LAYOUTS["dist dp2 padded"]
    went_on = run_ranks(world, train_and_save, str(tmp_path), world, options, "gather")[0]
    resumed, _ = run_ranks(world, resume, str(tmp_path), world, options)[0]
    assert resumed[0] != went_on[0]


@pytest.mark.slow
def test_loading_fails_without_the_kept_step(tmp_path):
    world, options = LAYOUTS["dist dp1"]
    run_ranks(world, train_and_save, str(tmp_path), world, options)
    with pytest.raises(AssertionError, match="KeyError: 'step'"):
        run_ranks(world, resume, str(tmp_path), world, options, "_set_main_param_and_optimizer")


def guarded_padding(rank: int) -> list[str]:
    messages = []
    with tiny_run(None, **layout(PADDED, 3)) as run:
        buffer = run.optimizer.chained_optimizers[0].buffers[0]
        assert any(b.grad_data.numel() != b.numel_unpadded for b in buffer.buckets[:-1])
        for undo in (False, True):
            if undo:
                megatron_patches().revert()
            try:
                guard_padded_buckets(run.optimizer)
                messages.append("")
            except CheckpointError as error:
                messages.append(str(error))
    return messages


def test_padded_buckets_are_refused_where_nothing_corrects_them():
    for prepared, unprepared in run_ranks(3, guarded_padding):
        assert prepared == ""
        expected = "parallel.ddp_bucket_size=10000: " if is_listed("fully_reshardable") else ""
        assert unprepared.startswith(expected) and bool(unprepared) == bool(expected)


def save_untrained(rank: int, folder: str, options: dict) -> list:
    with tiny_run(None, **layout(options, 1)) as run:
        save(run, folder)
        return train(run, 0)


def resume_untrained(rank: int, folder: str, options: dict) -> tuple:
    with tiny_run(None, seed=99, **layout(options, 1)) as run:
        load(run, folder)
        return train(run, 0), adam_steps(run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp dp1", "dist dp1"])
def test_a_checkpoint_before_the_first_step(tmp_path, kind):
    _, options = LAYOUTS[kind]
    went_on = run_ranks(1, save_untrained, str(tmp_path), options)[0]
    assert run_ranks(1, resume_untrained, str(tmp_path), options)[0] == (went_on, [float(STEPS)])


def group_order(rank: int, mutant: str) -> list[tuple]:
    mutate(mutant)
    with tiny_run(None, pp=2) as run:
        return [
            (group["wd_mult"], {param.ndim for param in group["params"]})
            for group in run.optimizer.param_groups
        ]


def test_parameter_groups_are_the_same_on_every_stage():
    first, last = run_ranks(2, group_order, "")
    assert first == last == [(1.0, {2}), (0.0, {1})], "vectors do not decay"
    if is_listed("_get_param_groups"):
        assert run_ranks(2, group_order, "_get_param_groups")[1] != last, "drop the patch"


def ternary_trace(rank: int, folder: str, is_resumed: bool) -> list:
    quant = QuantConfig(requantize="every_step")
    with tiny_run(quant, **layout(PADDED, 2)) as run:
        if is_resumed:
            load(run, folder)
        else:
            train(run, 0)
            with run.ternary.latents():
                save(run, folder)
        return train(run, SAVED_AT)


@pytest.mark.slow
def test_ternary_resume_is_bitwise(tmp_path):
    went_on = run_ranks(2, ternary_trace, str(tmp_path), False)
    assert run_ranks(2, ternary_trace, str(tmp_path), True) == went_on
