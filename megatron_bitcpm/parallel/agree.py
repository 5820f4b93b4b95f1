"""Failures that every rank raises alike.

A rank that raises alone leaves the others waiting in the next collective until it times out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_bitcpm.errors import BitcpmError, ConfigError, describe

T = TypeVar("T")


def on_all_ranks(
    action: Callable[[], T], error: Callable[[str], BitcpmError], main_only: bool = False
) -> T | None:
    """Do this rank's part of some work; raise on every rank when it failed on one. Collective.

    `action` has no collectives inside, and with `main_only` runs on rank 0 alone (the others return
    None). `error` makes the error out of a reason; a BitcpmError keeps its own message.
    """
    result: T | None = None
    failure: tuple[type[BitcpmError], Any] | None = None
    cause = None
    if not main_only or torch.distributed.get_rank() == 0:
        try:
            result = action()
        # Whatever it is, the other ranks must learn of it.
        except Exception as problem:
            cause = problem
            own = problem if isinstance(problem, BitcpmError) else error(describe(problem))
            failure = type(own), own.problems if isinstance(own, ConfigError) else str(own)
    if first := _first_of_ranks(failure):
        kind, message = first
        raise kind(message) from cause
    return result


def from_main_rank(action: Callable[[], T], error: Callable[[str], BitcpmError]) -> T:
    """Do some work on rank 0 and return its result, or raise its failure, on all. Collective.

    For files where ranks must not differ: on a shared file system one may see an earlier state.
    """
    box: list[Any] = [on_all_ranks(action, error, main_only=True)]
    torch.distributed.broadcast_object_list(box, src=0)
    result: T = box[0]
    return result


def first_reason(reason: str | None) -> str | None:
    """Return the reason of the first rank that has one, so that all decide alike; collective."""
    return _first_of_ranks(reason)


def _first_of_ranks(mine: T | None) -> T | None:
    everyone: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return next((found for found in everyone if found), None)
