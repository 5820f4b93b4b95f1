"""How far a run has come: what resume must know beside model and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Counters of a run; saved in every checkpoint.

    Attributes:
        iteration: optimizer steps done, skipped ones included.
        consumed_samples: position in the training data; ahead of the steps after a rollback.
        skipped_steps: steps without an update, because gradients were not finite.
        guard: the state of `LossGuard`.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
