"""Single files with tensors, safetensors and ``.bin``: opened once, read as views of the mapping.

A tensor is a view of the mapped file: reading takes no memory of its own, and the pages are the
operating system's to drop. Only ``.bin`` files from before torch 1.6 are no archives and have to
be read whole.

A ``.bin`` is a pickle. It is loaded with torch's restricted unpickler, which builds tensors and
plain containers only; anything else in it is refused and not run. The archive carries a checksum of
every tensor, so damaged values are found there; safetensors has none.
"""

from __future__ import annotations

import json
import mmap
import re
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_bitcpm.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of weights; all others (integers, fp8, float64) are of models this package cannot hold."""
_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_REPLACE = "Copy the file from its source again"
_LOCAL_HEADER_BYTES = 30


def file_error(path: Path, rule: str, fix: str = _REPLACE) -> CheckpointError:
    """Build the error of a file that is not what it should be, in one line."""
    error = CheckpointError.of("file", path, " ".join(rule.split()).rstrip("."), fix)
    assert isinstance(error, CheckpointError)
    return error


class TensorFile(ABC):
    """The tensors of one file.

    Attributes:
        path: the file.
    """

    path: Path

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    @abstractmethod
    def dtype_name(self, name: str) -> str:
        """Type of a tensor as the file calls it, of unsupported types too."""

    @abstractmethod
    def raw_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of any type: a view of the mapped file, never to be written to.

        Raises:
            CheckpointError: the file is damaged.
        """

    def tensor(self, name: str) -> torch.Tensor:
        """Read weights: `raw_tensor` of a type that this package computes with.

        Raises:
            CheckpointError: its type is unsupported, or the file is damaged.
        """
        self.dtype(name)
        return self.raw_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            CheckpointError: it is none of `DTYPES`.
        """
        written = self.dtype_name(name)
        dtype = _SAFETENSORS_DTYPES.get(written)
        if dtype is None:
            dtype = next((d for d in DTYPES if str(d) == f"torch.{written}"), None)
        if dtype is None:
            raise file_error(
                self.path, f"tensor {name} has type {written}, known are float32, bfloat16 and "
                "float16", "Use the unpacked weights of the model",
            )  # fmt: skip
        return dtype


class SafetensorsFile(TensorFile):
    """A safetensors file; the library checks that its tensors cover the file exactly.

    Args:
        path: the file.

    Raises:
        CheckpointError: absent, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file: Any = safe_open(path, framework="pt")
            self._file = file
            self._names: list[str] = list(file.keys())
            self._slices = {name: file.get_slice(name) for name in self._names}
        # The library raises several types, for an empty file an OSError.
        except Exception as error:
            raise file_error(path, _explain_safetensors(path, error)) from error

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slices[name].get_shape())

    def dtype_name(self, name: str) -> str:
        """Type of a tensor as safetensors calls it."""
        return str(self._slices[name].get_dtype())

    def raw_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of any type."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise file_error(self.path, f"tensor {name} cannot be read: {error}") from error
        return tensor


class BinFile(TensorFile):
    """A file of `torch.save` that holds a dictionary of tensors.

    Args:
        path: the file.

    Raises:
        CheckpointError: absent, damaged, or it holds something else than named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = load_tensors_only(path)
        if not isinstance(content, Mapping) or not content:
            raise file_error(path, f"holds {type(content).__name__}, not named tensors",
                             "Name a state dict of a model")  # fmt: skip
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise file_error(path, f"{name!r} is {type(tensor).__name__}, not a tensor",
                                 "Name a state dict of a model")  # fmt: skip
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                raise file_error(path, f"tensor {name} is no ordinary tensor in memory",
                                 "Name a state dict of a model")  # fmt: skip
        self._tensors: dict[str, torch.Tensor] = {n: t.detach() for n, t in content.items()}
        check_archive(path, self._tensors)

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype_name(self, name: str) -> str:
        """Type of a tensor as torch calls it."""
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def raw_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of any type."""
        return self._tensors[name]


def open_tensor_file(path: str | Path) -> TensorFile:
    """Open a file with tensors by what it holds: ``.safetensors``, or a file of `torch.save`.

    Args:
        path: the file.

    Raises:
        CheckpointError: absent, of another kind, damaged, or it could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise file_error(path, "no such file", "Name a .safetensors, .bin or .pt file")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return BinFile(path)
    raise file_error(path, "is no file of tensors by its name",
                     "Name a .safetensors, .bin or .pt file")  # fmt: skip


def load_tensors_only(path: Path) -> Any:
    """Load a file of `torch.save` mapped, as far as torch's restricted unpickler allows it.

    Args:
        path: the file.

    Raises:
        CheckpointError: damaged, or it names a global that no tensor needs; nothing of it was run.
    """
    try:
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _check_stored(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it would warn about, it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except CheckpointError:
        raise
    # A damaged pickle raises nearly anything.
    except Exception as error:
        raise _explain_torch(path, error) from error


def _explain_torch(path: Path, error: Exception) -> Exception:
    """Say in one line what torch says in a page, about settings that are not this package's."""
    text = str(error)
    foreign = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"class ([\w.]+)", text)
    if foreign and "nsupported" in text:
        return file_error(
            path, f"names {foreign[1]}, which no tensor needs; nothing of it was run",
            "Use a safetensors file of a source that you trust",
        )  # fmt: skip
    with path.open("rb") as stream:
        start = stream.read(2)
    if not start:
        return file_error(path, "is empty")
    if start in (b"P", b"PK"):  # of an archive, whose end is not there
        return file_error(path, "is truncated, or no file of torch.save")
    if "Weights only load failed" in text:
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", text)
        return file_error(
            path, "is a pickle that torch.save did not write"
            f"{f' ({reason[1].strip()})' if reason else ''}; nothing of it was run",
            "Use a safetensors file of a source that you trust",
        )  # fmt: skip
    first_line = (text.split(". ")[0].splitlines() or [type(error).__name__])[0]
    return file_error(path, f"is damaged: {first_line[:160]}")


def _check_stored(path: Path) -> None:
    """Refuse compressed members: mapped, their bytes would be taken for values."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise file_error(path, f"its member {member.filename} is compressed",
                                 "Save it with torch.save")  # fmt: skip


def check_archive(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare the checksums of an archive of `torch.save`; older files have none.

    Args:
        path: the file.
        tensors: those that were mapped from it, to name the damaged one.

    Raises:
        CheckpointError: a member is damaged; names its tensor.
    """
    if not zipfile.is_zipfile(path):
        return
    offsets: dict[int, str] = {}
    with (
        zipfile.ZipFile(path) as archive,
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
    ):
        bad: list[int] = []
        for member in archive.infolist():
            start = _data_offset(mapped, member)
            offsets[start] = member.filename
            with content[start : start + member.file_size] as data:
                # 0: saved with torch's checksums switched off.
                if member.CRC and zlib.crc32(data) != member.CRC:
                    bad.append(start)
    if bad:
        name = _find_tensor(bad[0], offsets, tensors)
        where = f"tensor {name}" if name else f"member {offsets[bad[0]]}"
        raise file_error(path, f"{where} is damaged: its checksum differs")


def _data_offset(mapped: mmap.mmap, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: behind its local header, name and padding."""
    start = member.header_offset
    lengths = mapped[start + 26 : start + _LOCAL_HEADER_BYTES]
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return start + _LOCAL_HEADER_BYTES + name + extra


def _find_tensor(
    offset: int, offsets: Mapping[int, str], tensors: Mapping[str, torch.Tensor]
) -> str | None:
    """Return which tensor is mapped at an offset: the one base that fits all tensors says it."""
    pointers = {name: t.untyped_storage().data_ptr() for name, t in tensors.items()}
    first = next(iter(pointers.values()))
    for candidate in offsets:
        base = first - candidate
        if all(pointer - base in offsets for pointer in pointers.values()):
            found = (n for n, pointer in pointers.items() if pointer - base == offset)
            return next(found, None)
    return None


def _explain_safetensors(path: Path, error: Exception) -> str:
    """Say more than the library where a file is shorter or longer than its header says."""
    try:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(header_bytes, 100_000_000)))
        end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        found = path.stat().st_size - 8 - header_bytes
        if found != end:
            last = max(
                (k for k in header if k != "__metadata__"),
                key=lambda k: header[k]["data_offsets"][1],
            )
            state = "truncated" if found < end else "longer than its tensors"
            return f"is {state}: {found} bytes of values, the last tensor ({last}) ends at {end}"
    # Not even a header: what the library said is all there is.
    except Exception:
        pass
    reason = str(error).removeprefix("Error while deserializing header: ")
    return f"is damaged or no safetensors file: {reason.strip()[:160]}"
