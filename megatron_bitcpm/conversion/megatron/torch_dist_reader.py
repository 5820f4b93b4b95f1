"""Full tensors out of a torch_dist checkpoint, without a model and without a process group.

Megatron's torch_dist format keeps a tensor as chunks, whatever the layout it was written at, and
stacks the layers in dimension 0 (or numbers them). `TorchDistTensors` reads one tensor, or one
layer of it, at a time: the chunks lie in mapped files, and where one chunk is all that is asked for
it is not copied. Their checksums are compared. Optimizer and random states are never read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_bitcpm.arch.tensors import (
    STACKED_PREFIX,
    Shape,
    TensorSpec,
    layer_prefix,
    name_of,
    split_layer,
)
from megatron_bitcpm.checkpoint.safe_load import COMMON_FILE, load_common, read_metadata
from megatron_bitcpm.checkpoint.torch_file import StoredTensor, TorchFile, map_file
from megatron_bitcpm.conversion.megatron.folder import OTHER_MODEL
from megatron_bitcpm.conversion.megatron.source import MegatronTensors, refuse_dtype
from megatron_bitcpm.conversion.megatron.stock_args import StockModel, read_args
from megatron_bitcpm.errors import describe, refusal


class TorchDistTensors(MegatronTensors):
    """The model tensors of a torch_dist checkpoint, a folder with ``.metadata``.

    Raises:
        CheckpointError: the index is absent, damaged or refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = read_metadata(folder)
        # Also where nothing in it is needed: Megatron would load it.
        self._common = load_common(folder)
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self._places = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in metadata.storage_data.items()
            if isinstance(index, MetadataIndex)
        }
        self._files: dict[str, memoryview] = {}

    def read_args(self) -> StockModel:
        """Return what the arguments say."""
        args, iteration = self._common.get("args"), self._common.get("iteration")
        return read_args(args, iteration, self.folder / COMMON_FILE)

    def dtype(self, spec: TensorSpec, layer: int | None) -> torch.dtype:
        """Type of a tensor."""
        dtype: torch.dtype = self._entry(self._stored_name(spec, layer)).properties.dtype
        return dtype

    def tensor(self, spec: TensorSpec, layer: int | None) -> torch.Tensor:
        """Read a full tensor, without the layer dimension."""
        name = self._stored_name(spec, layer)
        shape = tuple(self._entry(name).size)
        if layer is None or name == name_of(spec, layer):
            return self._read(name, (0,) * len(shape), shape)
        if not layer < shape[0]:
            rule = f"{name} has {shape[0]} layers, none of number {layer}"
            raise refusal(self.folder, rule)
        return self._read(name, (layer,) + (0,) * (len(shape) - 1), (1, *shape[1:]))[0]

    def shapes(self) -> dict[str, Shape]:
        """Return Megatron's name -> full shape of every tensor, layers numbered."""
        found = {}
        for name, entry in self._entries.items():
            if name.endswith("_extra_state"):
                continue
            shape = tuple(entry.size)
            refuse_dtype(entry.properties.dtype, name, self.folder)
            if not name.startswith(STACKED_PREFIX) or split_layer(name)[0] is not None:
                found[name] = shape
                continue
            local = name.removeprefix(STACKED_PREFIX)
            found |= {layer_prefix(n) + local: shape[1:] for n in range(shape[0])}
        return found

    def _stored_name(self, spec: TensorSpec, layer: int | None) -> str:
        """Return the name of a tensor, layers numbered where the checkpoint numbers them."""
        name = name_of(spec, layer)
        return name if layer is None or name in self._entries else STACKED_PREFIX + spec.name

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._entries:
            raise refusal(self.folder, f"has no tensor {name}", OTHER_MODEL)
        return self._entries[name]

    def _read(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Read the box of `shape` that begins at `start`."""
        result = None
        covered: list[tuple[list[int], list[int]]] = []
        for chunk in self._entry(name).chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            stored = self._read_chunk(name, tuple(chunk.offsets), tuple(chunk.sizes))
            part = stored[_box(low, high, chunk.offsets)]
            if tuple(part.shape) == shape:
                return part
            if result is None:
                result = torch.empty(shape, dtype=stored.dtype)
            result[_box(low, high, start)] = part
            if any(_overlap(low, high, *other) for other in covered):
                raise refusal(self.folder, f"tensor {name}: some values are listed twice")
            covered.append((low, high))
        count = sum(math.prod(b - a for a, b in zip(*box, strict=True)) for box in covered)
        if result is None or count != result.numel():
            rule = f"tensor {name}: {count} of {math.prod(shape)} values are listed"
            raise refusal(self.folder, rule)
        return result

    def _read_chunk(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        file = None
        try:
            info = self._places[name, offsets]
            file = info.relative_path
            if getattr(info, "transform_descriptors", None):
                raise ValueError("is stored in a transformed (compressed) form")
            if file not in self._files:
                self._files[file] = map_file(self.folder / file)
            end = info.offset + info.length
            if not 0 <= info.offset <= end <= self._files[file].nbytes:
                raise ValueError(f"is cut off: {self._files[file].nbytes} of {end} bytes")
            item = TorchFile(self._files[file][info.offset : end])
            stored = item.content
            if not isinstance(stored, StoredTensor) or stored.shape != sizes:
                raise ValueError("holds something else")
            if stored.dtype != self._entries[name].properties.dtype:
                raise ValueError(f"is {stored.dtype}, unlike the index")
            return item.tensor(stored)
        # A damaged file can raise nearly anything while its pickle is decoded.
        except Exception as error:
            rule = f"tensor {name} in {file or 'no file'} cannot be read: {describe(error)}"
            raise refusal(self.folder, rule) from error


def _box(low: Any, high: Any, origin: Any) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _overlap(low: list[int], high: list[int], low2: list[int], high2: list[int]) -> bool:
    """Whether two boxes share a value."""
    return all(max(a, b) < min(c, d) for a, b, c, d in zip(low, low2, high, high2, strict=True))
