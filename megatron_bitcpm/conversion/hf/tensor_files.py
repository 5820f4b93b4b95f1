"""Single files with tensors, safetensors and ``.bin``: opened once, read as views of the mapping.

Reading takes no memory of its own: the pages are the operating system's to drop.

A ``.bin`` is a pickle, which `checkpoint.torch_file` reads: tensors and plain containers only;
anything else in it is refused and not run. The archive carries a checksum of every tensor, which is
compared when the tensor is read; safetensors has none.
"""

from __future__ import annotations

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_bitcpm.arch.tensors import Shape
from megatron_bitcpm.checkpoint.torch_file import StoredTensor, TorchFile, map_file
from megatron_bitcpm.conversion.tensor_stream import WEIGHT_DTYPES, dtype_name
from megatron_bitcpm.errors import CheckpointError, describe

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""What files of tensors end in."""
_REPLACE = "Copy the file from its source again"


def file_error(path: Path, rule: str, fix: str = _REPLACE) -> CheckpointError:
    """Build the error of a file that is not what it should be, in one line."""
    return CheckpointError(f"file={path}: {' '.join(rule.split()).rstrip('.')}. {fix}.")


class TensorFile(ABC):
    """The tensors of one file, in its order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, tuple[Shape, str]] = {}

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file."""
        return list(self._entries)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self._entries[name][0]

    def dtype_name(self, name: str) -> str:
        """Type of a tensor as the file calls it, of unsupported types too."""
        return self._entries[name][1]

    def torch_dtype_name(self, name: str) -> str:
        """Type of a tensor as torch calls it, where this package supports it."""
        written = self.dtype_name(name)
        return _SAFETENSORS_DTYPES.get(written, written)

    @abstractmethod
    def raw_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of any type: a view of the mapped file, never to be written to."""

    def tensor(self, name: str) -> torch.Tensor:
        """Read weights: `raw_tensor` of a type that this package computes with."""
        self.dtype(name)
        return self.raw_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor; CheckpointError where it is none of `WEIGHT_DTYPES`."""
        known = self.torch_dtype_name(name)
        dtype = next((d for d in WEIGHT_DTYPES if str(d) == f"torch.{known}"), None)
        if dtype is None:
            raise file_error(
                self.path,
                f"tensor {name} has type {known}, known are float32, bfloat16 and float16",
                "Use the unpacked weights of the model",
            )
        return dtype


class SafetensorsFile(TensorFile):
    """A safetensors file; the library checks that its tensors cover the file exactly."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._file: Any = safe_open(path, framework="pt")
            for name in self._file.keys():  # noqa: SIM118 (the file is not a dictionary)
                entry = self._file.get_slice(name)
                self._entries[name] = tuple(entry.get_shape()), str(entry.get_dtype())
        # The library raises several types, for an empty file an OSError.
        except Exception as error:
            raise file_error(path, _explain_safetensors(path, error)) from error

    def raw_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of any type."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise file_error(self.path, f"tensor {name} cannot be read: {error}") from error
        return tensor


class BinFile(TensorFile):
    """A file of `torch.save` that holds a dictionary of tensors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._file = TorchFile(map_file(path))
        # A damaged or hostile file raises nearly anything while it is decoded.
        except Exception as error:
            raise _explain_bin(path, error) from error
        content = self._file.content
        fix = "Name a state dict of a model"
        if not isinstance(content, Mapping) or not content:
            raise file_error(path, f"holds {_name_type(content)}, not named tensors", fix)
        for name, stored in content.items():
            if not isinstance(name, str) or not isinstance(stored, StoredTensor):
                rule = f"{name!r:.80} is {_name_type(stored)}, not a tensor with a name"
                raise file_error(path, rule, fix)
            self._entries[name] = stored.shape, dtype_name(stored.dtype)
        self._stored: dict[str, StoredTensor] = dict(content)

    def raw_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of any type; its checksum is compared."""
        try:
            return self._file.tensor(self._stored[name])
        except Exception as error:
            raise file_error(self.path, f"tensor {name} is damaged: {describe(error)}") from error


def open_tensor_file(path: str | Path) -> TensorFile:
    """Open a ``.safetensors`` file or one of `torch.save`; refuse what could run code."""
    path = Path(path)
    fix = "Name a .safetensors, .bin or .pt file"
    if not path.is_file():
        raise file_error(path, "no such file", fix)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in SUFFIXES:
        return BinFile(path)
    raise file_error(path, "is not a file of tensors by its name", fix)


def _name_type(value: Any) -> str:
    if isinstance(value, StoredTensor):
        return "a tensor"
    return "dict" if isinstance(value, dict) else type(value).__name__


def _explain_bin(path: Path, error: Exception) -> Exception:
    """Say in one line what is wrong with a file of `torch.save`."""
    with path.open("rb") as stream:
        start = stream.read(2)
    if not start:
        return file_error(path, "is empty")
    if len(start) < 2 or "not a zip file" in str(error):  # an archive ends with its directory
        return file_error(path, "is truncated, or no file of torch.save")
    if isinstance(error, pickle.UnpicklingError):
        return file_error(
            path,
            f"{describe(error)}; nothing of it was run",
            "Use a safetensors file of a source that you trust",
        )
    return file_error(path, f"is damaged: {describe(error)[:160]}")


def _explain_safetensors(path: Path, error: Exception) -> str:
    """Say more than the library where a file is shorter or longer than its header says."""
    try:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(header_bytes, 100_000_000)))
        ends = {k: v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"}
        last = max(ends, key=ends.__getitem__)
        end, found = ends[last], path.stat().st_size - 8 - header_bytes
        if found != end:
            state = "truncated" if found < end else "longer than its tensors"
            return f"is {state}: {found} bytes of values, the last tensor ({last}) ends at {end}"
    # Not even a header: what the library said is all there is.
    except Exception:
        pass
    reason = str(error).removeprefix("Error while deserializing header: ")
    return f"is damaged or no safetensors file: {reason.strip()[:160]}"
