"""Which versions of megatron-core the ternary linears are tested with."""

from __future__ import annotations

from importlib.metadata import version

from megatron_bitcpm.errors import ModelError

TESTED = ("0.16.",)


def check_megatron_version() -> None:
    """Refuse a version whose internals were not checked.

    Raises:
        ModelError: another version is installed.
    """
    installed = version("megatron-core")
    if not installed.startswith(TESTED):
        raise ModelError.of(
            "megatron-core", installed, f"is not one of the tested versions {', '.join(TESTED)}x",
            "Install megatron-core==0.16.1",
        )  # fmt: skip
