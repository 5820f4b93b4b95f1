"""An unpickler that a hostile file can neither crash nor keep busy.

What a pickle may *refer to* is in `pickle_names`. But a few bytes that refer to nothing can harm
Python's own unpickler: an entry of its memo with a number of nine digits takes all memory, the hash
of a deeply nested key overflows the stack, and that of a key which holds another one twice, and so
on, never ends. So this one is in Python, with a dictionary for a memo, and its keys are flat and
short.
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


def _check_first(code: bytes, keys: slice) -> None:
    """Look at the keys that lie on the stack before an opcode puts them into something."""
    load = pickle._Unpickler.dispatch[code[0]]

    def check_and_load(unpickler: Any) -> None:
        check_keys(unpickler.stack[keys])
        load(unpickler)

    StrictUnpickler.dispatch[code[0]] = check_and_load


def _load_state(unpickler: Any) -> None:
    # Of a class or function it would be changed for the whole process.
    changed = unpickler.stack[-2]
    if callable(changed) or isinstance(changed, unpickler.unchangeable):
        raise pickle.UnpicklingError("changes a class, a function or a tensor")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


def _refuse(unpickler: Any) -> None:
    raise pickle.UnpicklingError("holds what no checkpoint holds")


_check_first(pickle.SETITEM, slice(-2, -1))
_check_first(pickle.SETITEMS, slice(None, None, 2))
_check_first(pickle.DICT, slice(None, None, 2))
_check_first(pickle.ADDITEMS, slice(None))
_check_first(pickle.FROZENSET, slice(None))
StrictUnpickler.dispatch[pickle.BUILD[0]] = _load_state
for _code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4):
    StrictUnpickler.dispatch[_code[0]] = _refuse
