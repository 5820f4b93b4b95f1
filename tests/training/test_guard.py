"""The guard against hand-made series of losses."""

from __future__ import annotations

import json
import math

import pytest

from megatron_bitcpm.config import GuardConfig
from megatron_bitcpm.errors import TrainingError
from megatron_bitcpm.training.guard import LossGuard, Verdict

NAN, INF = math.nan, math.inf
# A window of four losses with median 2, spikes from above 3.
SPIKES = {"loss_spike_threshold": 1.0, "loss_spike_window": 4, "max_spikes": 2}
CALM = [1.9, 2.0, 2.0, 2.1]


def acting_steps(guard: LossGuard, series: list, first: int = 1) -> list[int]:
    """Numbers of the steps after which the guard acts; entries are losses or (loss, taken)."""
    acting = []
    for iteration, entry in enumerate(series, first):
        loss, taken = entry if isinstance(entry, tuple) else (entry, True)
        if guard.observe(iteration, loss, taken).act:
            acting.append(iteration)
    return acting


@pytest.mark.parametrize("bad", [(NAN, True), (INF, True), (-INF, False), (2.0, False)])
def test_non_finite_losses_and_gradients_act_after_so_many_in_a_row(bad):
    guard = LossGuard(GuardConfig(max_skipped_steps=3))
    assert acting_steps(guard, [2.0, bad, bad, 2.0, bad, bad, bad, bad, 2.0, bad]) == [7, 8]


def test_kinds_of_trouble_count_together():
    guard = LossGuard(GuardConfig(max_skipped_steps=3))
    assert acting_steps(guard, [(NAN, False), (2.0, False), (INF, True)]) == [3]


def test_spikes_act_after_so_many_in_a_row_and_recover():
    guard = LossGuard(GuardConfig(**SPIKES))
    assert acting_steps(guard, [*CALM, 3.5, 2.0, 3.5, 3.01, 3.0, 3.5]) == [8]


def test_no_spike_before_the_window_is_full():
    guard = LossGuard(GuardConfig(**SPIKES))
    assert acting_steps(guard, [1.0, 1.0, 1.0, 50.0, 60.0, 70.0]) == [6]


def test_spikes_do_not_become_the_norm():
    guard = LossGuard(GuardConfig(**{**SPIKES, "max_spikes": 1000}))
    verdicts = [guard.observe(i, loss, True) for i, loss in enumerate([*CALM, *[9.0] * 50])]
    assert [v.spike for v in verdicts] == [False] * 4 + [True] * 50


def test_a_slow_rise_is_no_spike_because_the_window_moves():
    guard = LossGuard(GuardConfig(**SPIKES))
    assert acting_steps(guard, [2 + 0.2 * i for i in range(40)]) == []


def test_a_loss_that_is_not_finite_neither_continues_nor_ends_a_row_of_spikes():
    guard = LossGuard(GuardConfig(**SPIKES))
    assert acting_steps(guard, [*CALM, 3.5, NAN, 3.5]) == [7]
    guard = LossGuard(GuardConfig(**SPIKES))
    assert acting_steps(guard, [*CALM, 3.5, NAN, NAN, 2.0, 3.5]) == []


def test_without_a_threshold_there_are_no_spikes():
    guard = LossGuard(GuardConfig())
    assert acting_steps(guard, [1.0] * 100 + [1e9] * 100) == []


def test_stop_is_one_line_with_numbers_and_a_fix():
    guard = LossGuard(GuardConfig(max_skipped_steps=2))
    guard.observe(8, NAN, False)
    with pytest.raises(TrainingError) as caught:
        guard.begin_rollback(guard.observe(9, NAN, False))
    assert str(caught.value) == (
        "guard.max_skipped_steps=2: 2 step(s) in a row had a non-finite loss or gradient, the last "
        "was step 9. Lower optimizer.lr, resume from an earlier checkpoint, or use "
        "guard.action=rollback."
    )


def test_a_spike_stop_says_how_far_above_the_median():
    guard = LossGuard(GuardConfig(**{**SPIKES, "max_spikes": 1}))
    verdicts = [guard.observe(i, loss, True) for i, loss in enumerate([*CALM, 3.5], 1)]
    with pytest.raises(
        TrainingError,
        match=r"guard\.max_spikes=1: .* step 5: 3\.5000 is more than "
        r"1\.0 above the median 2\.0000 of the last 4 good losses",
    ):
        guard.begin_rollback(verdicts[-1])


def test_rollbacks_are_counted_and_limited():
    guard = LossGuard(GuardConfig(action="rollback", max_rollbacks=2, max_skipped_steps=1))
    saved = guard.state()
    for count in (1, 2):
        guard.begin_rollback(guard.observe(5, NAN, False))
        guard.rewind(saved)
        assert guard.rollbacks == count and guard.skipped_in_a_row == 0
    with pytest.raises(TrainingError, match=r"guard.max_rollbacks=2: after 2 rollback"):
        guard.begin_rollback(guard.observe(5, NAN, False))


def test_a_rollback_forgets_the_losses_since_the_checkpoint():
    guard = LossGuard(GuardConfig(**SPIKES, action="rollback"))
    acting_steps(guard, CALM)
    saved = guard.state()
    # The run rises into a worse norm, then goes back.
    acting_steps(guard, [2.9, 2.9, 2.9, 2.9])
    guard.rewind(saved)
    assert guard.observe(9, 3.2, True).spike


SERIES = [*CALM, 3.5, NAN, 2.0, (2.0, False), (2.0, False), 3.5, NAN, 3.5, 3.5, NAN, NAN, NAN, 1.0]


@pytest.mark.parametrize("cut", range(len(SERIES)))
def test_a_resumed_run_acts_at_the_same_steps(cut):
    config = GuardConfig(**SPIKES, max_skipped_steps=3)
    whole = acting_steps(LossGuard(config), SERIES)
    assert whole == [12, 13, 16]
    guard = LossGuard(config)
    acting = acting_steps(guard, SERIES[:cut])
    # Through JSON, as in a checkpoint's state file.
    resumed = LossGuard.from_state(config, json.loads(json.dumps(guard.state())))
    assert acting + acting_steps(resumed, SERIES[cut:], cut + 1) == whole
    assert resumed.rollbacks == guard.rollbacks


def test_a_calm_step_says_nothing():
    assert LossGuard(GuardConfig()).observe(1, 2.0, True) == Verdict()
