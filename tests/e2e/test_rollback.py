"""The guard inside a run: what it does when the loss spikes."""

from __future__ import annotations

import json
import os
import signal

import pytest
from helpers.ranks import run_ranks
from helpers.runs import call_cli, numbers, tracked, train_well

pytestmark = pytest.mark.both_versions

SPIKE = {
    "guard__loss_spike_threshold": 2.0,
    "guard__loss_spike_window": 4,
    "guard__max_spikes": 2,
    "training__train_iters": 12,
    "checkpoint__save_interval": 4,
    "training__eval_interval": 12,
    "quant__requantize": "every_step",
    "parallel__tensor_model_parallel_size": 2,
}


def train_with_bad_data(rank: int, arguments: list[str], bad: range) -> tuple[int, str]:
    """Train; the loss of the steps that read the given samples is 5 nats too high."""
    from megatron_bitcpm.training.trainer import Trainer

    original = Trainer.step

    def step(self, batches):
        consumed = self.progress.consumed_samples
        loss, norm = original(self, batches)
        return loss + 5 * (consumed in bad), norm

    Trainer.step = step
    try:
        return call_cli(rank, arguments)
    finally:
        Trainer.step = original


@pytest.mark.slow
def test_a_spike_rolls_back_and_goes_on_with_later_data(write_config, tmp_path):
    config = write_config("run", **SPIKE, guard__action="rollback", checkpoint__keep_last_n=1)
    arguments = ["train", "--config", str(config)]
    # Steps 8 and 9 read samples 56 to 71; at step 8 a checkpoint would be due.
    for code, message in run_ranks(2, train_with_bad_data, arguments, range(56, 72)):
        assert code == 0, message
    losses = numbers(tmp_path / "run", "loss")
    assert list(losses) == list(range(1, 13))
    # Back to step 4 and past the bad samples: step 5 is what would have been step 10.
    state = json.loads((tmp_path / "run" / "iter_0000012" / "bitcpm_state.json").read_text())
    assert state["consumed_samples"] == (12 + 5) * 8 and state["guard"]["rollbacks"] == 1
    clean = write_config("clean", **{**SPIKE, "training__train_iters": 5})
    train_well(2, clean)
    assert losses[4] == numbers(tmp_path / "clean", "loss")[4]
    assert losses[5] != numbers(tmp_path / "clean", "loss")[5]
    # The schedule goes on from step 4 too: warm-up, then the peak until the decay of the last two.
    rates = numbers(tmp_path / "run", "learning_rate")
    assert [rates[n] for n in (1, 2, 5, 10, 12)] == [2.5e-3, 5e-3, 5e-3, 5e-3, 0.0]
    # A resumed run remembers.
    train_well(2, config, "--resume", "--set", "training.train_iters=14")
    state = json.loads((tmp_path / "run" / "iter_0000014" / "bitcpm_state.json").read_text())
    assert state["consumed_samples"] == (14 + 5) * 8 and state["guard"]["rollbacks"] == 1


@pytest.mark.slow
def test_the_run_stops_when_rolling_back_does_not_help(write_config, tmp_path):
    config = write_config("run", **SPIKE, guard__action="rollback", guard__max_rollbacks=1)
    arguments = ["train", "--config", str(config)]
    for code, message in run_ranks(2, train_with_bad_data, arguments, range(40, 10000)):
        assert code == 2
        assert "guard.max_rollbacks=1: after 1 rollback(s) the run went wrong again" in message
    assert (tmp_path / "run" / "iter_0000004").is_dir()


@pytest.mark.slow
def test_the_run_stops_at_a_spike(write_config, tmp_path):
    config = write_config("run", **SPIKE)
    arguments = ["train", "--config", str(config)]
    for code, message in run_ranks(2, train_with_bad_data, arguments, range(40, 56)):
        assert code == 2
        assert "guard.max_spikes=2: 2 loss spike(s) in a row, the last at step 7" in message


def train_and_get_a_signal(rank: int, arguments: list[str], bad: range) -> tuple[int, str]:
    """Train with bad data; the first bad step ends in a SIGTERM."""
    from megatron_bitcpm.training.guard import LossGuard

    original = LossGuard.observe

    def observe(self, *args):
        verdict = original(self, *args)
        if verdict.spike:
            os.kill(os.getpid(), signal.SIGTERM)
        return verdict

    LossGuard.observe = observe
    try:
        return train_with_bad_data(rank, arguments, bad)
    finally:
        LossGuard.observe = original


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_spike_keeps_the_good_checkpoint(write_config, tmp_path):
    config = write_config("run", **SPIKE, guard__action="rollback", checkpoint__keep_last_n=1)
    arguments = ["train", "--config", str(config)]
    for code, message in run_ranks(2, train_and_get_a_signal, arguments, range(48, 64)):
        assert code == 0, message
    assert tracked(tmp_path / "run") == 4
    assert max(numbers(tmp_path / "run", "loss")) == 7
    train_well(2, config, "--resume")
    assert tracked(tmp_path / "run") == 12
