"""Files of `torch.save`, written and read one tensor at a time, with checked checksums.

`torch.save` wants all tensors of a file in memory and spends most of its time on its checksum;
`torch.load` does not look at the checksum at all. A file is a zip archive of uncompressed records:
a pickle that describes the objects, and one record for each tensor's memory. Here Python's own
`zipfile` writes and reads it. What is written is what `torch.load` reads, mapped or not.

Nothing in a file is executed: the pickle may name what `checkpoint.pickle_names` lists, and gets
inert records for it.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_bitcpm.checkpoint.pickle_names import InertUnpickler, refused
from megatron_bitcpm.conversion.tensor_stream import as_bytes

_ALIGNMENT = 64
_PADDING_ID = 0x4246  # torch's own for the extra field that moves a record to its place
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ZIP64_FIELD = 20
_ZIP64_FROM = 2**31 - 1
_CHUNK = 2**24


class SeekableFile(Protocol):
    """What is needed of a file to write an archive into it."""

    def write(self, data: Any, /) -> int:
        """Write all of `data`."""
        ...

    def seek(self, offset: int, whence: int = ..., /) -> int:
        """Go to another position."""
        ...

    def tell(self) -> int:
        """Return the position."""
        ...

    def flush(self) -> None:
        """Hand over what is buffered."""
        ...


@dataclass(frozen=True)
class LateTensor:
    """A tensor of a file to be written, which is read only when its turn comes.

    Attributes:
        shape, dtype: of the tensor.
        read: returns it; it may lie in a mapped file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Storage:
    """A tensor's memory as the pickle names it."""

    dtype: torch.dtype
    key: str
    numel: int


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Pickler(pickle.Pickler):
    """Pickles objects, collecting their tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[LateTensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = torch.storage._dtype_to_storage_type_map()[obj.dtype]
        return ("storage", getattr(torch, kind), obj.key, "cpu", obj.numel)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, LateTensor):
            return NotImplemented
        storage = _Storage(obj.dtype, str(len(self.tensors)), math.prod(obj.shape))
        self.tensors.append(obj)
        hooks: OrderedDict[str, Any] = OrderedDict()
        fields = (storage, 0, obj.shape, _strides(obj.shape), False, hooks)
        return torch._utils._rebuild_tensor_v2, fields


class _Part(io.RawIOBase):
    """The end of a file, from where it was, as a file of its own."""

    def __init__(self, file: SeekableFile) -> None:
        self._file, self._start = file, file.tell()

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        start = self._start if whence == 0 else 0
        return self._file.seek(offset + start, whence) - self._start

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        self._file.flush()


def write_torch_file(file: SeekableFile, content: Any) -> int:
    """Write what ``torch.save(content, file)`` would, one tensor in memory at a time.

    Args:
        file: open for writing, seekable; what it holds before its position stays.
        content: picklable; its tensors are `LateTensor`.

    Returns:
        Bytes written.

    Raises:
        OSError: the file cannot be written.
    """
    description = io.BytesIO()
    pickler = _Pickler(description)
    pickler.dump(content)
    part = _Part(file)
    # Once "closed" by its destructor the wrapper does nothing to the file.
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_record(archive, part, "data.pkl", description.getbuffer())
        _write_record(archive, part, "byteorder", b"little")
        for key, late in enumerate(pickler.tensors):
            tensor = late.read()
            assert tuple(tensor.shape) == late.shape and tensor.dtype == late.dtype, late
            _write_record(archive, part, f"data/{key}", as_bytes(tensor))
            del tensor
        _write_record(archive, part, "version", b"3\n")
    return part.tell()


def _write_record(archive: zipfile.ZipFile, part: _Part, name: str, data: Any) -> None:
    info = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    data = memoryview(data)
    large = data.nbytes >= _ZIP64_FROM
    header = _LOCAL_HEADER.size + len(info.filename) + (_ZIP64_FIELD if large else 0)
    missing = -(part.tell() + header + 4) % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, missing) + bytes(missing)
    info.file_size = data.nbytes
    with archive.open(info, "w", force_zip64=large) as record:
        for start in range(0, data.nbytes, _CHUNK):
            record.write(data[start : start + _CHUNK])


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a file.

    Attributes:
        shape, stride, dtype: of the tensor.
        record: name of the record with its memory.
        offset: of its first value in that memory, in values.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    record: str
    offset: int


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: Any, stride: Any, *unused: Any
) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("describes a tensor without memory")
    numbers = (*shape, *stride, offset)
    if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("describes a tensor of an impossible shape")
    return StoredTensor(tuple(shape), tuple(stride), storage.dtype, storage.key, offset)


class _Unpickler(InertUnpickler):
    unchangeable = (_Storage, StoredTensor)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *unused: data
        if module == "torch" and name.endswith("Storage"):
            for dtype, kind in torch.storage._dtype_to_storage_type_map().items():
                if kind == name:
                    return dtype
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("refers to another file")
        dtype = pid[1]
        if not isinstance(dtype, torch.dtype):
            raise refused("storage", type(dtype).__name__)
        return _Storage(dtype, f"data/{pid[2]}", int(pid[4]))


class TorchFile:
    """A file of `torch.save`, mapped; or one of several in a ``.distcp`` file.

    Args:
        memory: the file's bytes.

    Attributes:
        content: its objects; tensors are `StoredTensor`, other objects inert records.

    Raises:
        pickle.UnpicklingError: it refers to something that no checkpoint needs.
        Exception: damaged, of any kind: zipfile and pickle raise nearly anything.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        with zipfile.ZipFile(_Bytes(memory)) as archive:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if len(infos) != len(archive.infolist()):
                raise zipfile.BadZipFile("has two records of one name")
        self._records = infos
        self._checked: set[str] = set()
        if "data.pkl" not in infos:
            raise zipfile.BadZipFile("is no file of torch.save")
        if "byteorder" in infos and bytes(self._bytes("byteorder")) != b"little":
            raise zipfile.BadZipFile("has another byte order")
        self.content: Any = _Unpickler(io.BytesIO(self._bytes("data.pkl"))).load()

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """Return a tensor that lies in the mapped file; its checksum is compared once.

        Args:
            stored: from `content`.

        Raises:
            zipfile.BadZipFile: another checksum, or a record that is absent or too short.
        """
        data = self._bytes(stored.record)
        size, count = stored.dtype.itemsize, math.prod(stored.shape)
        last = sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
        if count == 0 or min((*stored.stride, stored.offset, 0)) < 0:
            raise zipfile.BadZipFile("describes a tensor of an impossible shape")
        # A tensor that repeats values of its memory could be of any size.
        if (stored.offset + max(last + 1, count)) * size > data.nbytes:
            raise zipfile.BadZipFile(f"record {stored.record} is shorter than its tensor")
        first = stored.offset * size
        flat = torch.frombuffer(data[first : first + (last + 1) * size], dtype=torch.uint8)
        if flat.data_ptr() % size:
            flat = flat.clone()
        return flat.view(stored.dtype).as_strided(stored.shape, stored.stride)

    def _bytes(self, name: str) -> memoryview:
        info = self._records.get(name)
        if info is None:
            raise zipfile.BadZipFile(f"has no record {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise zipfile.BadZipFile(f"record {name} is compressed or encrypted")
        header = self._memory[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
        signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name_start = info.header_offset + _LOCAL_HEADER.size
        start = name_start + name_length + extra_length
        named = bytes(self._memory[name_start : name_start + name_length])
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        # The directory at the end could point anywhere.
        if signature[:4] != _LOCAL_SIGNATURE or named != info.orig_filename.encode(encoding):
            raise zipfile.BadZipFile(f"record {name} is not where the file says")
        data = self._memory[start : start + info.file_size]
        if data.nbytes != info.file_size:
            raise zipfile.BadZipFile(f"record {name} is cut off")
        if name not in self._checked:
            # Saved without checksums (torch.serialization.set_crc32_options): nothing to compare.
            if info.CRC and zlib.crc32(data) != info.CRC:
                raise zipfile.BadZipFile(f"record {name} has another checksum: its bytes changed")
            self._checked.add(name)
        return data


class _Bytes(io.RawIOBase):
    """Memory as a file, without the copy of `io.BytesIO`."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._position = memory, 0

    def readinto(self, buffer: Any) -> int:
        data = self._memory[self._position : self._position + len(buffer)]
        buffer[: data.nbytes] = data
        self._position += data.nbytes
        return data.nbytes

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._memory.nbytes)[whence]
        if self._position < 0:
            raise OSError("seeks before the beginning")
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def map_file(path: Path) -> memoryview:
    """Map a file into memory, copy-on-write: a mistaken write never reaches the file.

    Raises:
        OSError: absent or unreadable.
        ValueError: empty.
    """
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
