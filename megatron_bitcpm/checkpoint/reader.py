"""Full tensors out of a training checkpoint, without a model and without a process group.

Megatron's torch_dist format keeps a tensor as chunks, whatever the layout it was trained at, and
stacks the layers in dimension 0. `CheckpointReader` reads one tensor, or one layer of it, at a
time: memory stays at that tensor. Optimizer states and random states are never read.

What does not live here: names and layouts of other formats, see `megatron_to_hf`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron_bitcpm.checkpoint.safe_load import read_metadata
from megatron_bitcpm.checkpoint.store import find_checkpoint, read_config, read_state
from megatron_bitcpm.config import RunConfig
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.parallel.agree import describe

_LAYERS = "decoder.layers."


class CheckpointReader:
    """Reads the model tensors of a training checkpoint.

    Args:
        checkpoint: a checkpoint, or a run's folder (its newest checkpoint).

    Attributes:
        folder: the checkpoint's folder.
        state: ``bitcpm_state.json``: iteration, losses, quantiser stamp.
        config: the resolved configuration of the run.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.folder = find_checkpoint(checkpoint)
        self.state: dict[str, Any] = read_state(self.folder)
        self.config: RunConfig = read_config(self.folder)
        self._metadata = read_metadata(self.folder)
        self._entries = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self._storage = FileSystemReader(str(self.folder))
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)

    def names(self) -> list[str]:
        """Names of the model's tensors; those of layers are stacked in dimension 0."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor as stored (with the layers in dimension 0)."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        dtype: torch.dtype = self._entry(name).properties.dtype
        return dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Read one full tensor as stored.

        Args:
            name: one of `names`.

        Raises:
            CheckpointError: absent, or its files are missing or damaged.
        """
        shape = self.shape(name)
        return self._read(name, (0,) * len(shape), shape)

    def layer_tensor(self, name: str, layer: int) -> torch.Tensor:
        """Read one layer's part of a stacked tensor, without the layer dimension.

        Args:
            name: name without the layer number, for example ``mlp.linear_fc2.weight``.
            layer: global layer number, from 0.

        Raises:
            CheckpointError: absent, or its files are missing or damaged.
        """
        stacked = _LAYERS + name
        shape = self.shape(stacked)
        if not 0 <= layer < shape[0]:
            raise CheckpointError.of(
                "layer", layer, f"{stacked} has layers 0 to {shape[0] - 1}", "Use one of those"
            )
        start = (layer,) + (0,) * (len(shape) - 1)
        return self._read(stacked, start, (1, *shape[1:]))[0]

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._entries:
            raise CheckpointError.of(
                "checkpoint", self.folder, f"has no tensor {name}",
                "Use a checkpoint of a Llama model trained by this package",
            )  # fmt: skip
        return self._entries[name]

    def _read(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Read the box of `shape` that begins at `start`."""
        result = torch.empty(shape, dtype=self.dtype(name))
        items = self._plan(name, start, shape)
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != result.numel():
            raise self._damaged(name, f"{covered} of {result.numel()} values are listed")
        planner = DefaultLoadPlanner()
        planner.set_up_planner({name: result}, self._metadata, is_coordinator=True)
        try:
            self._storage.read_data(LoadPlan(items), planner).wait()
        # A damaged file can raise nearly anything while its pickle is decoded.
        except Exception as error:
            raise self._damaged(name, describe(error)) from error
        return result

    def _plan(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> list[ReadItem]:
        """List the parts of stored chunks that make up a box."""
        items = []
        for chunk in self._entry(name).chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(name, (0,) * len(start)),
                    dest_offsets=torch.Size(a - b for a, b in zip(low, start, strict=True)),
                    storage_index=MetadataIndex(name, chunk.offsets),
                    storage_offsets=torch.Size(
                        a - b for a, b in zip(low, chunk.offsets, strict=True)
                    ),
                    lengths=torch.Size(b - a for a, b in zip(low, high, strict=True)),
                )
            )
        return items

    def _damaged(self, name: str, reason: str) -> CheckpointError:
        files = sorted(
            {
                info.relative_path
                for index, info in self._metadata.storage_data.items()
                if index.fqn == name
            }
        )
        error = CheckpointError.of(
            "checkpoint", self.folder,
            f"tensor {name} in {', '.join(files) or 'no file'} cannot be read: {reason}",
            "The checkpoint is damaged; use another one",
        )  # fmt: skip
        assert isinstance(error, CheckpointError)
        return error
