"""The exception family: what a user sees when an input is wrong.

Every message is one line of the form ``field=value: rule. Fix.`` The command line prints it without
a traceback and exits with code 2. Broken invariants of our own are ``assert``, not these classes.
"""

from __future__ import annotations

from typing import Any, TypeVar

E = TypeVar("E", bound="BitcpmError")


def format_problem(field: str, value: Any, rule: str, fix: str) -> str:
    """Return ``field=value: rule. Fix.``, the form of every message in this package.

    Args:
        field: configuration key, argument or file that is wrong.
        value: the offending value, as the user gave it.
        rule: the rule it breaks, without a final full stop.
        fix: what to do, without a final full stop.
    """
    return f"{field}={value}: {rule}. {fix}."


class BitcpmError(ValueError):
    """Base of all errors caused by input; the message is one line with the fix."""

    @classmethod
    def of(cls: type[E], field: str, value: Any, rule: str, fix: str) -> E:
        """Build the error from the four parts of its message, see `format_problem`."""
        return cls(format_problem(field, value, rule, fix))


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


class TrainingError(BitcpmError):
    """A run that had to stop, for example after repeated non-finite gradients."""
