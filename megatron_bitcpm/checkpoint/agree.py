"""Failures that every rank raises alike.

A rank that raises alone leaves the others waiting in the next collective until it times out. Work
on files is therefore done between two collectives, and its outcome exchanged in the second.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_bitcpm.errors import BitcpmError, CheckpointError

T = TypeVar("T")


def on_all_ranks(
    action: Callable[[], T], error: Callable[[str], BitcpmError], main_only: bool = False
) -> T | None:
    """Do this rank's part of some work; raise on every rank when it failed on one. Collective.

    Args:
        action: this rank's part, without collectives.
        error: makes the error out of the reason. A BitcpmError keeps its own message.
        main_only: only rank 0 has a part.

    Returns:
        What `action` returned on this rank; None where it was not called.
    """
    result, failure, cause = None, None, None
    if not main_only or torch.distributed.get_rank() == 0:
        try:
            result = action()
        # Whatever it is, the other ranks must learn of it.
        except Exception as problem:
            cause = problem
            own = isinstance(problem, BitcpmError)
            failure = str(problem) if own else str(error(describe(problem)))
    failures: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    first = next((text for text in failures if text is not None), None)
    if first is not None:
        raise CheckpointError(first) from cause
    return result


def describe(problem: BaseException) -> str:
    """Return the reason of a failure on one line, without a full stop.

    What the operating system said comes first: torch's writer hides it behind errors of its own.
    """
    seen: BaseException | None = problem
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            where = f" ({os.path.basename(str(seen.filename))})" if seen.filename else ""
            return os.strerror(seen.errno) + where
        seen = seen.__cause__ or seen.__context__
    # Torch collects the failures of several ranks in one message, the cause last.
    return " ".join(str(problem).split())[-300:].rstrip(". ") or type(problem).__name__
