"""``pytorch_model.bin`` files written tensor by tensor; the format is in `torch_file_writer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import torch

from megatron_bitcpm.conversion.tensor_stream import FlushedFile
from megatron_bitcpm.conversion.torch_file_writer import LateTensor, write_torch_file


def write_bin(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    aliases: Mapping[str, str] | None = None,
) -> int:
    """Write a state dict as `torch.save` would, and flush it to disk.

    Args:
        path: must not exist.
        layout: name -> (shape, dtype) of its tensors, in their order.
        tensors: the tensors, in that order.
        aliases: further name -> name in `layout` of the same tensor.
    Returns:
        Bytes of the file.

    Raises:
        OSError: it cannot be written; a part of it is left.
    """
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
