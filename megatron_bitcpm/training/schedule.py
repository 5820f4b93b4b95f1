"""The learning rate over a run: Megatron's schedule, with the decay that 0.12 lacks."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_bitcpm.config import RunConfig


class LearningRateSchedule(OptimizerParamScheduler):
    """Megatron's schedule, with ``minus_sqrt`` as the shape of a WSD decay."""

    def get_lr(self, param_group: Any) -> float:
        """Return the learning rate of a parameter group at the current step."""
        decay_steps = self.wsd_decay_steps
        assert decay_steps is not None
        step = self.num_steps - (self.lr_decay_steps - decay_steps)
        decays = self.lr_decay_style == "WSD" and 0 < step <= decay_steps
        if not decays or self.lr_wsd_decay_style != "minus_sqrt":
            rate: float = super().get_lr(param_group)
            return rate
        low, high = param_group.get("min_lr", self.min_lr), param_group.get("max_lr", self.max_lr)
        return float(low + (high - low) * (1 - math.sqrt(step / decay_steps)))


def build_scheduler(config: RunConfig, optimizer: Any) -> LearningRateSchedule:
    """Build the schedule; of a checkpoint it takes only the number of steps, not the shape."""
    settings, iters = config.optimizer, config.training.train_iters
    return LearningRateSchedule(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=iters,
        wd_incr_style="constant",
        wsd_decay_steps=settings.wsd_decay_iters(iters),
        lr_wsd_decay_style=settings.wsd_decay_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
