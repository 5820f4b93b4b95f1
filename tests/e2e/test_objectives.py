"""A second objective is a class with `forward_step`: nothing else of the trainer changes."""

from __future__ import annotations

import pytest
from helpers.ranks import run_ranks
from helpers.runs import numbers

from megatron_bitcpm.config import parse_config
from megatron_bitcpm.training.runtime import start_runtime

pytestmark = pytest.mark.both_versions


class TwiceTheLoss:
    """The next token's loss times two."""

    def __init__(self, device) -> None:
        from megatron_bitcpm.training.objectives.next_token import NextToken

        self.once = NextToken(device)

    def forward_step(self, batches, model):
        output, once = self.once.forward_step(batches, model)

        def twice(output):
            total, tokens, report = once(output)
            return 2 * total, tokens, {"loss": report["loss"] * report["loss"].new_tensor([2, 1])}

        return output, twice


def train(rank: int, text: str, objective: type | None) -> None:
    from megatron_bitcpm.training.trainer import Trainer

    config = parse_config(text, world_size=2)
    with start_runtime(config.parallel, config.training.seed) as runtime:
        Trainer(config, runtime, objective and objective(runtime.device)).run(resume=False)


def test_another_objective_trains_and_is_reported(write_config, tmp_path):
    for name, objective in (("once", None), ("twice", TwiceTheLoss)):
        path = write_config(
            name,
            parallel__pipeline_model_parallel_size=2,
            training__train_iters=4,
            training__eval_interval=2,
        )
        run_ranks(2, train, path.read_text(), objective)
    found = {
        key: [numbers(tmp_path / name, key) for name in ("once", "twice")]
        for key in ("loss", "grad_norm", "valid_loss")
    }
    # A factor of two moves exponents only.
    for once, twice in (found["loss"], found["grad_norm"]):
        assert twice[1] == 2 * once[1]
    # Adam's step does not depend on a factor, but for its epsilon and the clipping.
    for key in ("loss", "valid_loss"):
        once, twice = found[key]
        assert once.keys() == twice.keys() and len(once) > 1
        assert all(twice[n] == pytest.approx(2 * once[n], rel=0.02) for n in once)
