"""Which versions of megatron-core the ternary linears are tested with."""

from __future__ import annotations

from importlib.metadata import version

from megatron_bitcpm.errors import ModelError

TESTED = ("0.12.1", "0.16.")


def is_tested_version() -> bool:
    """Whether the internals that this package relies on were checked on the installed release."""
    return version("megatron-core").startswith(TESTED)


def check_megatron_version() -> None:
    """Refuse a version whose internals were not checked.

    Raises:
        ModelError: another version is installed.
    """
    if not is_tested_version():
        raise ModelError(
            f"megatron-core={version('megatron-core')}: is not one of the tested versions 0.12.1 "
            "and 0.16.x. Install megatron-core==0.16.1."
        )
