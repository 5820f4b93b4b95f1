"""Loading a checkpoint that may come from elsewhere: no pickle in it can run code.

A torch_dist checkpoint has three kinds of pickle: the index ``.metadata`` (torch reads it with
plain pickle), ``common.pt`` (megatron-core 0.12) and the byte entries inside the ``.distcp`` files
(random states; torch), both read without restriction. Files that are checked first and loaded
afterwards could be exchanged in between. So the loader itself is restricted: within
`restricted_unpickling` every `torch.load` is one with ``weights_only=True``, whatever the caller
asked for, and the index goes through `MetadataUnpickler`. `load_sharded` also fixes the format:
other formats of Megatron (zarr) have loaders of their own.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_bitcpm.checkpoint.pickle_names import PATH_NAMES, make_container, refused, stand_ins
from megatron_bitcpm.checkpoint.strict_pickle import StrictUnpickler
from megatron_bitcpm.checkpoint.torch_file import TorchFile, check_pickle, map_file
from megatron_bitcpm.errors import describe, refusal
from megatron_bitcpm.patching.patch import Patch, PatchSet

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
_TORCH_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    "torch.serialization": {"_get_layout"},
    _TORCH_CHECKPOINT + "metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    _TORCH_CHECKPOINT + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    _TORCH_CHECKPOINT + "planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "pathlib": PATH_NAMES,
    "pathlib._local": PATH_NAMES,
}
_MEGATRON_MODULE = "megatron.core.dist_checkpointing.strategies.torch"


class _MegatronRecord:
    """Stands for records that only 0.12 has; the index can be read without Megatron."""


class MetadataUnpickler(StrictUnpickler):
    """Reads torch's index of a checkpoint, which is a pickle, without running foreign code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few classes that an index is made of."""
        if module == "torch":
            value = getattr(torch, name, None)
            if value is torch.Size or isinstance(value, torch.dtype):
                return value
        elif module == "collections":
            return make_container(name)
        elif module == _MEGATRON_MODULE and name in ("MCoreMetadata", "MCoreSavePlan"):
            return _MegatronRecord
        elif name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise refused(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Return torch's index of a checkpoint; refuse what no checkpoint needs."""
    path = folder / METADATA_FILE
    try:
        metadata = MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("is not the index of a torch_dist checkpoint")
        _check_index(metadata)
    # A damaged pickle raises nearly anything: EOFError, IndexError, UnicodeDecodeError, ...
    except Exception as error:
        raise _unsafe(path, describe(error)) from error
    return metadata


def _check_index(metadata: Metadata) -> None:
    """Refuse an index whose parts are not what torch writes, so that readers can rely on them."""
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex):
            raise pickle.UnpicklingError("lists the place of something without a name")
        if Path(info.relative_path).name != info.relative_path:
            raise pickle.UnpicklingError(f"refers to {info.relative_path}, another folder")
        if not _are_sizes((info.offset, info.length)):
            raise pickle.UnpicklingError(f"has an impossible place of {index.fqn}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if not _are_sizes(entry.size) or not isinstance(entry.properties.dtype, torch.dtype):
            raise pickle.UnpicklingError(f"describes tensor {name} without shape or type")
        for chunk in entry.chunks:
            if (
                not isinstance(chunk, ChunkStorageMetadata)
                or not _are_sizes(chunk.offsets)
                or not _are_sizes(chunk.sizes)
                or not len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
            ):
                raise pickle.UnpicklingError(f"describes an impossible part of tensor {name}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values)


def find_damage(folder: Path) -> str | None:
    """Return what a checkpoint's Megatron part lacks, or None; sizes are checked, not contents."""
    for name in (METADATA_FILE, COMMON_FILE, "metadata.json"):
        if not (folder / name).is_file():
            return f"no {name}"
    ends: dict[str, int] = {}
    for info in read_metadata(folder).storage_data.values():
        name = info.relative_path
        ends[name] = max(ends.get(name, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < end:
            return f"no {name}" if size is None else f"{name} has {size} of {end} bytes"
    return None


def load_common(folder: Path) -> dict[str, Any]:
    """Return ``common.pt``: what all ranks share; objects are inert records, see `torch_file`."""
    path = folder / COMMON_FILE
    try:
        common: Any = TorchFile(map_file(path)).content
        if not isinstance(common, dict):
            raise pickle.UnpicklingError("does not hold a dictionary")
    except Exception as error:
        raise _unsafe(path, describe(error)) from error
    return common


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Within the block no pickle that torch or Megatron load from a file can run code."""
    # NumPy's are real: random states are restored. Of all others an inert record is enough.
    names = [*_numpy_globals(), *stand_ins()]
    with torch.serialization.safe_globals(names), _restrictions().applied():
        yield


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load a sharded state dict with Megatron's loader, restricted; collective."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with restricted_unpickling():
            loaded: dict[str, Any] = dist_checkpointing.load(
                state, str(folder), TorchDistLoadShardedStrategy(), TorchCommonLoadStrategy()
            )
    # Damaged files fail inside torch's, zip's or pickle's code with whatever these raise; torch
    # collects the failures of all ranks in a BaseException of its own.
    except (Exception, CheckpointException) as error:
        raise _unsafe(folder, _shorten(error)) from error
    return loaded


def _unsafe(path: Path, reason: str) -> Exception:
    fix = "The checkpoint is damaged or not of this package; use another one"
    return refusal(path, f"cannot be loaded: {reason}", fix)


def _shorten(error: BaseException) -> str:
    """Return the reason in a refusal of torch, which is a page about its settings."""
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"refers to {refused[1]}, which no checkpoint needs"
    if reason := re.search(r"WeightsUnpickler error: (.+)", str(error)):
        return reason[1].strip().rstrip(".")
    return describe(error)


def _numpy_globals() -> list[Any]:
    """What numpy's random state, which is in the checkpoints of earlier versions, is made of."""
    array = np.zeros(1, np.uint32)
    rebuild = array.__reduce__()[0]
    return [
        np.ndarray,
        np.dtype,
        type(array.dtype),
        # The name of the module differs between numpy 1 and 2, in the file and here.
        rebuild,
        (rebuild, "numpy.core.multiarray._reconstruct"),
        (rebuild, "numpy._core.multiarray._reconstruct"),
    ]


def _weights_only(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(file: Any, map_location: Any = None, **options: Any) -> Any:
        data = Path(file).read_bytes() if isinstance(file, str | Path) else file.read()
        # Torch's own restricted unpickler does not mind what crashes Python, see `strict_pickle`.
        check_pickle(data)
        return original(io.BytesIO(data), map_location=map_location, weights_only=True)

    return load


class _RestrictedPickle:
    """Stands for the module `pickle` where torch reads the index."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        if name in ("loads", "Unpickler"):
            raise pickle.UnpicklingError(f"pickle.{name} is not restricted")
        return getattr(self._original, name)

    def load(self, file: Any) -> Any:
        return MetadataUnpickler(file).load()


@functools.cache
def _restrictions() -> PatchSet:
    patch = functools.partial(Patch, package="torch", exit="torch and Megatron restrict it")
    return PatchSet(
        "restricted unpickling",
        [
            patch("torch:load", _weights_only, "asked for without restriction"),
            patch(_TORCH_CHECKPOINT + "filesystem:pickle", _RestrictedPickle, "reads the index"),
        ],
    )
