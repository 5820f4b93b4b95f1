"""Files of `torch.save`, written one tensor at a time.

`torch.save` wants all tensors of a file in memory and spends most of its time on its checksum. Here
Python's own `zipfile` writes the archive. What is written is what `torch.load` reads, mapped or
not, and what `checkpoint.torch_file` reads.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from megatron_bitcpm.checkpoint.torch_file import LOCAL_HEADER, Storage
from megatron_bitcpm.conversion.tensor_stream import FlushedFile, as_bytes

_ALIGNMENT = 64
_PADDING_ID = 0x4246  # torch's own for the extra field that moves a record to its place
_ZIP64_FIELD = 20
_ZIP64_FROM = 2**31 - 1
_CHUNK = 2**24


@dataclass(frozen=True)
class LateTensor:
    """A tensor of a file to be written, which is read only when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Pickler(pickle.Pickler):
    """Pickles objects, collecting their tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[LateTensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        kind = torch.storage._dtype_to_storage_type_map()[obj.dtype]
        return ("storage", getattr(torch, kind), obj.key, "cpu", obj.numel)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, LateTensor):
            return NotImplemented
        storage = Storage(obj.dtype, str(len(self.tensors)), math.prod(obj.shape))
        self.tensors.append(obj)
        hooks: OrderedDict[str, Any] = OrderedDict()
        fields = (storage, 0, obj.shape, _strides(obj.shape), False, hooks)
        return torch._utils._rebuild_tensor_v2, fields


class _Part(io.RawIOBase):
    """The end of a file, from where it was, as a file of its own."""

    def __init__(self, file: BinaryIO | FlushedFile) -> None:
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


def write_torch_file(file: BinaryIO | FlushedFile, content: Any) -> int:
    """Write what ``torch.save(content, file)`` would, one tensor in memory at a time.

    What the file holds before its position stays. Tensors in the content are `LateTensor`. Returns
    the bytes written.
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
    header = LOCAL_HEADER.size + len(info.filename) + (_ZIP64_FIELD if large else 0)
    missing = -(part.tell() + header + 4) % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, missing) + bytes(missing)
    info.file_size = data.nbytes
    with archive.open(info, "w", force_zip64=large) as record:
        for start in range(0, data.nbytes, _CHUNK):
            record.write(data[start : start + _CHUNK])
