"""The exception family: what a user sees when an input is wrong.

Every message is one line, ``field=value: rule. Fix.``, written out where it is raised. The command
line prints it without a traceback and exits with code 2. Our own invariants are ``assert``.
"""

from __future__ import annotations

import os


class BitcpmError(ValueError):
    """Base of all errors caused by input; the message is one line with the fix."""


class ConfigError(BitcpmError):
    """One or more configuration problems, each a line of `problems`."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class BackendError(BitcpmError):
    """A requested operator backend is absent or failed to load."""


class DataError(BitcpmError):
    """Text, tokenizer or dataset files that cannot be used."""


class ModelError(BitcpmError):
    """A model that cannot be ternarised, or whose ternary layers did not do their work."""


class CheckpointError(BitcpmError):
    """A checkpoint that is absent, incomplete, damaged or of another model."""


DAMAGED = "The checkpoint is damaged; use another one"


def refusal(path: object, rule: str, fix: str = DAMAGED) -> CheckpointError:
    """Build the error of a checkpoint that cannot be used."""
    return CheckpointError(f"checkpoint={path}: {rule}. {fix}.")


class TrainingError(BitcpmError):
    """A run that had to stop, for example after repeated non-finite gradients."""


def one_line(value: object, limit: int = 200) -> str:
    """Return a value's text on one line, cut to `limit` characters, without a final full stop."""
    return " ".join(str(value).split())[:limit].rstrip(". ")


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
    text = " ".join(str(problem).split())
    return text[-300:].rstrip(". ") or type(problem).__name__
