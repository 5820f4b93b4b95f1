"""Which release of a package runs here, and which releases of megatron-core are tested.

Many run Megatron from a checkout, of which pip knows nothing. So the version of megatron-core is
that of the folder which ``import megatron.core`` takes; its file is read, Megatron not imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from packaging.version import Version

from megatron_bitcpm.errors import BackendError, ModelError

TESTED = ("0.12.1", "0.16.")
"""Beginnings of the versions of megatron-core on which our use of its internals was checked."""


def version_of(package: str) -> str:
    """Return the version of a package, named as pip names it; PackageNotFoundError if absent."""
    if package != "megatron-core":
        return importlib.metadata.version(package)
    found = _megatron_on_path()
    imported = getattr(sys.modules.get("megatron.core"), "__version__", found)
    if imported.split("+")[0] != found:
        raise BackendError(
            f"megatron-core={imported}: was imported, but the path led to {found}. Put the one you "
            "want first in PYTHONPATH, and leave sys.path as it is."
        )
    return found


# The first answer holds, so that a Megatron that comes onto the path later is noticed.
@functools.cache
def _megatron_on_path() -> str:
    megatron = importlib.util.find_spec("megatron")
    if megatron is not None:
        # `find_spec("megatron.core")` would import `megatron`. All finders are asked, because a
        # checkout that pip installed as editable has its own and lies in no folder of the path.
        for finder in sys.meta_path:
            try:
                spec = finder.find_spec("megatron.core", megatron.submodule_search_locations)
            except KeyError:  # a folder without code: Python looks for its parent, unimported
                continue
            if spec is not None and spec.origin is not None:
                return _read_version(Path(spec.origin).with_name("package_info.py"))
    raise PackageNotFoundError("megatron-core")


def _read_version(package_info: Path) -> str:
    constants: dict[str, object] = {}
    try:
        for node in ast.parse(package_info.read_bytes()).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                    constants[name] = value
        return "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format(**constants)
    except (OSError, SyntaxError, KeyError):
        raise BackendError(
            f"megatron-core={package_info}: names no version. Install megatron-core==0.16.1."
        ) from None


def required_version(package: str) -> str:
    """As `version_of`, but an absent package is an error for the user, BackendError."""
    try:
        return version_of(package)
    except PackageNotFoundError:
        wanted = "megatron-core==0.16.1" if package == "megatron-core" else package
        raise BackendError(f"{package}=(absent): is not installed. Install {wanted}.") from None


def release_of(package: str) -> tuple[int, int]:
    """Return (major, minor) of a required package."""
    version = Version(required_version(package))
    return version.major, version.minor


def megatron_version() -> tuple[int, int]:
    """Return (major, minor) of megatron-core."""
    return release_of("megatron-core")


def check_megatron_version() -> None:
    """Refuse with a ModelError a megatron-core whose internals were not checked."""
    version = required_version("megatron-core")
    if not version.startswith(TESTED):
        raise ModelError(
            f"megatron-core={version}: is not one of the tested versions 0.12.1 and 0.16.x. "
            "Install megatron-core==0.16.1."
        )
