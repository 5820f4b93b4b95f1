"""A reversible replacement of one symbol, as data.

A symbol that is missing in a release where it is listed is an error: a change of Megatron must not
make a replacement useless unnoticed. Reverting checks that the symbol still is what we put there,
so that two parties that patch the same place are noticed instead of silently undone.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_bitcpm.errors import BitcpmError
from megatron_bitcpm.patching.versions import release_of, required_version, version_of

_ABSENT = object()


def _own_attribute(holder: Any, name: str) -> Any:
    """Return what a module or class itself holds under a name, not what it inherits."""
    if isinstance(holder, types.ModuleType):
        return getattr(holder, name, _ABSENT)
    return vars(holder).get(name, _ABSENT)


@dataclass(frozen=True)
class Patch:
    """One symbol to replace.

    Attributes:
        target: ``module:attribute.path``, for example ``torch:cuda.synchronize``.
        make: called with the original, returns the replacement.
        why: the reason, one line.
        exit: when the patch can go, one line.
        package: the one whose release decides, named as pip names it.
        versions: the releases that need it, as (major, minor); empty means all.
        instead_of_absent: the symbol may be missing; the replacement is then added.
    """

    target: str
    make: Callable[[Any], Any]
    why: str
    exit: str
    package: str
    versions: tuple[tuple[int, int], ...] = ()
    instead_of_absent: bool = False

    def is_needed(self) -> bool:
        """Whether the release of `package` that runs here is listed."""
        return not self.versions or release_of(self.package) in self.versions

    def resolve(self) -> tuple[Any, str]:
        """Return the object that holds the symbol, and the symbol's name in it."""
        module_name, _, path = self.target.partition(":")
        holder: Any = importlib.import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            holder = getattr(holder, parent)
        return holder, name


class PatchSet:
    """Those patches of a catalogue that are needed here, applied and reverted together."""

    def __init__(self, name: str, catalogue: list[Patch]) -> None:
        self.name = name
        self.patches = [patch for patch in catalogue if patch.is_needed()]
        self._applied: list[tuple[Patch, Any, str, Any, Any]] = []

    @property
    def is_applied(self) -> bool:
        """Whether the patches are in force."""
        return bool(self._applied)

    def apply(self) -> None:
        """Put every replacement in place; nothing happens when that is done already."""
        if self._applied:
            return
        try:
            for patch in self.patches:
                holder, name, original = self._find(patch)
                own, replacement = _own_attribute(holder, name), patch.make(original)
                setattr(holder, name, replacement)
                self._applied.append((patch, holder, name, own, replacement))
            for package in {patch.package for patch in self.patches if patch.versions}:
                version_of(package)  # refuses another release than `is_needed` was told
        except BaseException:
            self.revert()
            raise

    def _find(self, patch: Patch) -> tuple[Any, str, Any]:
        """Return what holds a symbol, its name there, and the symbol, None if it is added."""
        try:
            holder, name = patch.resolve()
            if patch.instead_of_absent:
                return holder, name, getattr(holder, name, None)
            return holder, name, getattr(holder, name)
        except (ImportError, AttributeError):
            release = f"{patch.package} {required_version(patch.package)}"
            raise BitcpmError(
                f"patches={self.name}: {patch.target} does not exist with {release} ({patch.why}). "
                "Report the version."
            ) from None

    def revert(self) -> None:
        """Restore every original, last patch first; BitcpmError if others replaced one since."""
        foreign = []
        while self._applied:
            patch, holder, name, own, replacement = self._applied.pop()
            if _own_attribute(holder, name) is not replacement:
                foreign.append(patch.target)
            elif own is _ABSENT:
                delattr(holder, name)
            else:
                setattr(holder, name, own)
        if foreign:
            raise BitcpmError(
                f"patches={self.name}: {', '.join(foreign)} was replaced by others since. Revert "
                "theirs first."
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply for the duration of a block."""
        was_applied = self.is_applied
        self.apply()
        try:
            yield
        finally:
            if not was_applied:
                self.revert()
