"""Safetensors files written tensor by tensor.

The library's `save_file` wants all tensors of a file in memory at once. The format is simple: eight
bytes with the length of a JSON header, the header with type, shape and place of every tensor, then
their bytes one after the other. Types and shapes are known beforehand, so the header goes first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_bitcpm.conversion.tensor_stream import FlushedFile, as_bytes, count_bytes

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
_ALIGNMENT = 8


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> int:
    """Write one file and flush it to disk.

    Args:
        path: must not exist.
        layout: name -> (shape, dtype) of its tensors, in their order.
        tensors: the tensors, in that order.
    Returns:
        Bytes of the file.

    Raises:
        OSError: it cannot be written; a part of it is left.
    """
    expected = iter(layout.items())
    with FlushedFile(path) as file:
        file.write(_make_header(layout))
        for name, tensor in tensors:
            wanted, (shape, dtype) = next(expected)
            assert (name, tuple(tensor.shape), tensor.dtype) == (wanted, tuple(shape), dtype)
            file.write(as_bytes(tensor.contiguous()))
        assert next(expected, None) is None
    return file.size


def _make_header(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
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
