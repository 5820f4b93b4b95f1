"""Weight files written tensor by tensor: safetensors and ``pytorch_model.bin``, flushed to disk.

Safetensors' own `save_file` wants all tensors of a file in memory at once. The format is simple:
eight bytes with the length of a JSON header, the header with type, shape and place of every tensor,
then their bytes one after the other. Types and shapes are known beforehand, so the header goes
first. The format of ``.bin`` is in `torch_file_writer`.

Both writers take a path that must not exist and the tensors in the order of the layout, return the
bytes of the file, and leave a part of it when an OSError stops them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import torch

from megatron_bitcpm.conversion.tensor_stream import FlushedFile, as_bytes, count_bytes
from megatron_bitcpm.conversion.torch_file_writer import LateTensor, write_torch_file

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types that both kinds of weight files are written with -> their name in safetensors."""
Entries = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape, dtype) of the tensors of a file, in their order."""
_ALIGNMENT = 8


def write_safetensors(
    path: Path, layout: Entries, tensors: Iterable[tuple[str, torch.Tensor]]
) -> int:
    """Write a safetensors file."""
    expected = iter(layout.items())
    with FlushedFile(path) as file:
        file.write(_make_header(layout))
        for name, tensor in tensors:
            wanted, (shape, dtype) = next(expected)
            assert (name, tuple(tensor.shape), tensor.dtype) == (wanted, tuple(shape), dtype)
            file.write(as_bytes(tensor.contiguous()))
        assert next(expected, None) is None
    return file.size


def _make_header(layout: Entries) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in layout.items():
        end = offset + count_bytes(shape, dtype)
        header[name] = {
            "dtype": TYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Blanks so that the data begins aligned, as readers that map the file like it.
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_bin(
    path: Path,
    layout: Entries,
    tensors: Iterable[tuple[str, torch.Tensor]],
    aliases: Mapping[str, str] | None = None,
) -> int:
    """Write a state dict as `torch.save` would; `aliases`: further name -> name in `layout`."""
    source = iter(tensors)

    def late(name: str) -> LateTensor:
        def read() -> torch.Tensor:
            found, tensor = next(source)
            assert found == name
            return tensor

        shape, dtype = layout[name]
        return LateTensor(tuple(shape), dtype, read)

    content = {name: late(name) for name in layout}
    # One object under two names stays one through a pickle.
    content |= {name: content[target] for name, target in (aliases or {}).items()}
    with FlushedFile(path) as file:
        write_torch_file(cast("BinaryIO", file), content)
    return file.size
