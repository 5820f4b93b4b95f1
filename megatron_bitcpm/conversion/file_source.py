"""The tensors of weight files by themselves, without a config.json that is known to fit them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_bitcpm.arch.tensors import Shape
from megatron_bitcpm.conversion.hf.tensor_files import TensorFile
from megatron_bitcpm.conversion.source import TensorSource


@dataclass(frozen=True, kw_only=True)
class FileSource(TensorSource):
    """Tensors of one file, or of several, which may hold only the first ones of `layers`."""

    files: Mapping[str, TensorFile]
    layers: int

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return self.layers

    def shapes(self) -> dict[str, Shape]:
        """Return name -> shape of every tensor, in the order of the files."""
        return {name: file.shape(name) for name, file in self.files.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return self.files[name].dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a stored tensor, a view of its mapped file."""
        return self.files[name].tensor(name)
