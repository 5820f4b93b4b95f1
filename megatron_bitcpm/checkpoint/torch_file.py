"""Files of `torch.save`, read one tensor at a time, with checked checksums.

`torch.load` looks at no checksum, and its restricted unpickler can be crashed and kept busy by a
few bytes. A file is a zip archive of uncompressed records: a pickle that describes the objects, and
one record for each tensor's memory; before torch 1.6 it was five pickles and the memory behind
them. Both are read from a mapped file here, in Python, and tensors are views of it. Nothing is
executed, see `pickle_names`. `conversion.torch_file_writer` writes such files.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from megatron_bitcpm.checkpoint.pickle_names import InertUnpickler, refused

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""What precedes the name of a record in an archive."""
_LOCAL_SIGNATURE = b"PK\x03\x04"
_OLD_START = (0x1950A86A20F9469CFC6C, 1001)  # torch's magic number and version of the format
_NUMBER = struct.Struct("<q")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a file: its memory is a record, its first value is `offset` values in."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    record: str
    offset: int


@dataclass(frozen=True)
class Storage:
    """A tensor's memory as the pickle names it: `numel` values in the record `key`."""

    dtype: torch.dtype
    key: str
    numel: int


def _rebuild_tensor(
    storage: Storage, offset: int, shape: Any, stride: Any, *unused: Any
) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("describes a tensor without memory")
    numbers = (*shape, *stride, offset)
    if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("describes a tensor of an impossible shape")
    return StoredTensor(tuple(shape), tuple(stride), storage.dtype, storage.key, offset)


def _rebuild_typed_tensor(
    storage: Storage, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any
) -> StoredTensor:
    """A tensor whose memory is named without a type, as of float8."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("describes a tensor without memory or type")
    typed = Storage(dtype, storage.key, storage.numel)
    return _rebuild_tensor(typed, offset, shape, stride)


_REBUILD = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_typed_tensor,
    "_rebuild_parameter": lambda data, *unused: data,
    "_rebuild_parameter_with_state": lambda data, *unused: data,
}


class _Unpickler(InertUnpickler):
    unchangeable = (Storage, StoredTensor)

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _REBUILD:
            return _REBUILD[name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.uint8
        if module == "torch" and name.endswith("Storage"):
            for dtype, kind in torch.storage._dtype_to_storage_type_map().items():
                if kind == name:
                    return dtype
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        # Old files have a sixth entry, for storages that are parts of others.
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise pickle.UnpicklingError("refers to another file")
        dtype, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(dtype, torch.dtype):
            raise refused("storage", type(dtype).__name__)
        if (
            not isinstance(key, str)
            or type(numel) is not int
            or numel < 0
            or pid[5:] != (None,) * (len(pid) - 5)
        ):
            raise pickle.UnpicklingError("describes impossible memory")
        storage = Storage(dtype, f"data/{key}", numel)
        self.storages.setdefault(storage.key, storage)
        return storage


def check_pickle(data: bytes) -> None:
    """Read the pickle of an archive strictly and forget it: what torch is about to load."""
    with zipfile.ZipFile(_Bytes(memoryview(data))) as archive:
        description = archive.read(list_records(archive)["data.pkl"])
    _Unpickler(io.BytesIO(description)).load()


def list_records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the records of an archive of `torch.save` by their names below its folder."""
    infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    # Torch finds records without regard to capitals.
    if len({name.casefold() for name in infos}) != len(archive.infolist()):
        raise zipfile.BadZipFile("has two records of one name")
    if "data.pkl" not in infos:
        raise zipfile.BadZipFile("is not a file of torch.save")
    for name, info in infos.items():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise zipfile.BadZipFile(f"record {name} is compressed or encrypted")
    return infos


class _Archive:
    """The records of a zip archive; each checksum is compared once."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        with zipfile.ZipFile(_Bytes(memory)) as archive:
            self._infos = list_records(archive)
        self._checked: set[str] = set()
        if "byteorder" in self._infos and bytes(self.read("byteorder")) != b"little":
            raise zipfile.BadZipFile("has another byte order")
        self.content: Any = _Unpickler(io.BytesIO(self.read("data.pkl"))).load()

    def read(self, name: str) -> memoryview:
        info = self._infos.get(name)
        if info is None:
            raise zipfile.BadZipFile(f"has no record {name}")
        header = self._memory[info.header_offset : info.header_offset + LOCAL_HEADER.size]
        signature, *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
        name_start = info.header_offset + LOCAL_HEADER.size
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


class _OldRecords:
    """The memory behind the pickles of a file from before torch 1.6, which has no checksums."""

    def __init__(self, memory: memoryview) -> None:
        file = io.BufferedReader(_Bytes(memory))
        if (_Unpickler(file).load(), _Unpickler(file).load()) != _OLD_START:
            raise pickle.UnpicklingError("is a pickle that torch.save did not write")
        system = _Unpickler(file).load()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise pickle.UnpicklingError("has another byte order")
        objects = _Unpickler(file)
        self.content: Any = objects.load()
        self._records: dict[str, memoryview] = {}
        keys, position = _Unpickler(file).load(), file.tell()
        for key in keys if isinstance(keys, list) else ():
            storage = objects.storages.get(f"data/{key}")
            start = position + _NUMBER.size
            numel = memory[position:start]
            if storage is None or bytes(numel) != _NUMBER.pack(storage.numel):
                raise pickle.UnpicklingError(f"is cut off, or has another storage than {key}")
            position = start + storage.numel * storage.dtype.itemsize
            self._records[storage.key] = memory[start:position]

    def read(self, name: str) -> memoryview:
        if name not in self._records:
            raise pickle.UnpicklingError(f"has no storage {name}")
        return self._records[name]


class TorchFile:
    """A file of `torch.save`, mapped; or one of several in a ``.distcp`` file.

    `content` is its objects: tensors are `StoredTensor`, other objects inert records. A damaged
    file raises an exception of any kind: zipfile and pickle raise nearly anything.
    """

    def __init__(self, memory: memoryview) -> None:
        is_archive = bytes(memory[: len(_LOCAL_SIGNATURE)]) == _LOCAL_SIGNATURE
        self._records = _Archive(memory) if is_archive else _OldRecords(memory)
        self.content = self._records.content

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """Return a tensor that lies in the mapped file; its checksum is compared once."""
        data = self._records.read(stored.record)
        size, count = stored.dtype.itemsize, math.prod(stored.shape)
        if count == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        last = sum((n - 1) * step for n, step in zip(stored.shape, stored.stride, strict=True))
        if min((*stored.stride, stored.offset, 0)) < 0:
            raise zipfile.BadZipFile("describes a tensor of an impossible shape")
        # A tensor that repeats values of its memory could be of any size.
        if (stored.offset + max(last + 1, count)) * size > data.nbytes:
            raise zipfile.BadZipFile(f"record {stored.record} is shorter than its tensor")
        first = stored.offset * size
        flat = torch.frombuffer(data[first : first + (last + 1) * size], dtype=torch.uint8)
        if flat.data_ptr() % size:
            flat = flat.clone()
        return flat.view(stored.dtype).as_strided(stored.shape, stored.stride)


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
    """Map a file into memory, copy-on-write: a mistaken write never reaches the file."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
