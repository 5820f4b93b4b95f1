"""An unpickler that a hostile file can neither crash nor keep busy.

What a pickle may *refer to* is the business of `pickle_names`. But a few bytes that refer to
nothing are enough to harm Python's own unpickler: an entry of its memo with a number of nine digits
takes all memory, the hash of a deeply nested key overflows the stack, and the hash of a key that
holds another one twice, which holds another one twice, never ends. So this one is in Python, with a
dictionary for a memo, and its keys are flat and short.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

_FLAT = (type(None), bool, int, float, str, bytes, torch.dtype)
_DEEPEST_KEY = 3
_LONGEST_KEY = 16
_LONGEST_INTEGER = 64  # bits


def check_keys(keys: Iterable[Any], depth: int = 0) -> None:
    """Refuse keys whose hash could take long: nested too deeply, too long, of a foreign class."""
    for key in keys:
        # The hash of an integer is its remainder by 2^61 - 1: longer ones could all share it.
        if isinstance(key, int) and key.bit_length() > _LONGEST_INTEGER:
            raise pickle.UnpicklingError("has a key that no checkpoint has (a long integer)")
        if isinstance(key, _FLAT) or type(key).__hash__ is object.__hash__:
            continue
        parts = tuple(vars(key).values()) if isinstance(key, MetadataIndex) else key
        too_deep = depth == _DEEPEST_KEY
        if not isinstance(parts, tuple) or too_deep or len(parts) > _LONGEST_KEY:
            raise pickle.UnpicklingError(f"has a key that no checkpoint has ({type(key).__name__})")
        check_keys(parts, depth + 1)


class StrictUnpickler(pickle._Unpickler):
    """Reads a pickle; what it may refer to is for subclasses to say in `find_class`."""

    unchangeable: ClassVar[tuple[type, ...]] = ()
    """Classes whose objects are complete when they are made."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def _load_item(self) -> None:
        check_keys(self.stack[-2:-1])
        super().load_setitem()

    def _load_items(self) -> None:
        check_keys(self.stack[::2])
        super().load_setitems()

    def _load_members(self) -> None:
        check_keys(self.stack)
        super().load_additems()

    def _load_frozen_members(self) -> None:
        check_keys(self.stack)
        super().load_frozenset()

    def _load_dict(self) -> None:
        check_keys(self.stack[::2])
        super().load_dict()

    def _load_state(self) -> None:
        # Of a class or function it would be changed for the whole process.
        changed = self.stack[-2]
        if callable(changed) or isinstance(changed, self.unchangeable):
            raise pickle.UnpicklingError("changes a class, a function or a tensor")
        super().load_build()

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("holds what no checkpoint holds")

    dispatch[pickle.SETITEM[0]] = _load_item
    dispatch[pickle.SETITEMS[0]] = _load_items
    dispatch[pickle.ADDITEMS[0]] = _load_members
    dispatch[pickle.FROZENSET[0]] = _load_frozen_members
    dispatch[pickle.DICT[0]] = _load_dict
    dispatch[pickle.BUILD[0]] = _load_state
    for _code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = _refuse
