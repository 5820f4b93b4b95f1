"""A Megatron checkpoint as a `ModelSource`: fused weights, split into projections when asked for.

The tensors come from a `MegatronTensors`: of `torch_dist_reader` or `legacy_reader`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_bitcpm.arch.model import ModelConfig, megatron_shapes
from megatron_bitcpm.arch.tensors import EMBEDDING, OUTPUT, Place, Shape, TensorSpec, find_tensor
from megatron_bitcpm.conversion.difference import compare_shapes
from megatron_bitcpm.conversion.megatron.folder import MAX_LAYERS, OTHER_MODEL
from megatron_bitcpm.conversion.source import ModelSource, find_mixed_types
from megatron_bitcpm.conversion.tensor_stream import WEIGHT_DTYPES, dtype_name
from megatron_bitcpm.errors import DAMAGED, CheckpointError, refusal


class MegatronTensors(ABC):
    """Full tensors of a Megatron checkpoint, whatever its layout.

    Of a layer's tensor `layer` is the global number, from 0; outside the layers it is None.
    """

    folder: Path

    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Return Megatron's name -> full shape of every tensor, layers numbered."""

    @abstractmethod
    def dtype(self, spec: TensorSpec, layer: int | None) -> torch.dtype:
        """Type of a tensor."""

    @abstractmethod
    def tensor(self, spec: TensorSpec, layer: int | None) -> torch.Tensor:
        """Read a full tensor."""

    def check(self, model: ModelConfig) -> int:
        """Compare names and shapes with those of a model; return the rows of its embedding."""
        if model.num_layers > MAX_LAYERS:
            rule = f"no model has more than {MAX_LAYERS} ({self.folder}). {DAMAGED}"
            raise CheckpointError(f"num_layers={model.num_layers}: {rule}.")
        found = self.shapes()
        if EMBEDDING.name not in found:
            raise refusal(self.folder, f"has no tensor {EMBEDDING.name}", OTHER_MODEL)
        rows = (*found[EMBEDDING.name], 0)[0]
        if misfits := compare_shapes(found, megatron_shapes(model, rows)).describe():
            raise refusal(
                self.folder,
                f"is not the model it says: {misfits}",
                "It is damaged, or a model that is not converted here",
            )
        return rows


@dataclass(frozen=True, kw_only=True)
class MegatronSource(ModelSource):
    """A checkpoint of Megatron, by its full tensors; see `ModelSource`."""

    tensors: MegatronTensors
    _last: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse a model in both 16-bit types."""
        dtypes = {_find(name).megatron: self.dtype(name) for name in self.shapes()}
        if mixed := find_mixed_types(dtypes):
            raise refusal(self.path, mixed)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        place = _find(name)
        return self.tensors.dtype(place.spec, place.layer)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor; parts of a fused weight are best read one after the other."""
        place = _find(name)
        if place.spec in (EMBEDDING, OUTPUT):
            padded = self.padded_tensor(name)
            if padded.shape[0] < self.vocab_size:
                raise CheckpointError(
                    f"vocab_size={self.vocab_size}: {place.megatron} has {padded.shape[0]} rows. "
                    f"{DAMAGED}."
                )
            return padded[: self.vocab_size]
        if len(place.spec.parts) == 1:
            return self.tensors.tensor(place.spec, place.layer)
        if place.megatron not in self._last:
            self._last.clear()
            fused = self.tensors.tensor(place.spec, place.layer)
            self._last[place.megatron] = place.spec.split(fused, self.model.dimensions())
        return self._last[place.megatron][place.part]

    def padded_tensor(self, name: str) -> torch.Tensor:
        """Read the embedding or the output layer with its padding."""
        return self.tensors.tensor(_find(name).spec, None)


def _find(name: str) -> Place:
    place = find_tensor(name)
    assert place is not None, name
    return place


def refuse_dtype(dtype: torch.dtype, name: str, path: Path) -> None:
    """Refuse a tensor that is not of a type of weights."""
    if dtype not in WEIGHT_DTYPES:
        known = ", ".join(map(dtype_name, WEIGHT_DTYPES))
        rule = f"{name} is {dtype_name(dtype)}, weights are of {known}"
        raise refusal(path, rule, "Convert it to one of these first")
