"""A Megatron checkpoint as a `ModelSource`: fused weights, split into projections when asked for.

The tensors come from a `MegatronTensors`: `torch_dist_reader` or `legacy_reader`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.conversion.names import (
    EMBEDDING,
    FINAL_NORM,
    HF_EMBEDDING,
    HF_FINAL_NORM,
    HF_OUTPUT,
    LAYER_NORMS,
    LINEARS,
    OUTPUT,
    find_projection,
)
from megatron_bitcpm.conversion.source import ModelSource, find_mixed_types
from megatron_bitcpm.conversion.tensor_stream import WEIGHT_DTYPES
from megatron_bitcpm.errors import CheckpointError

_WHOLE = {HF_EMBEDDING: EMBEDDING, HF_OUTPUT: OUTPUT, HF_FINAL_NORM: FINAL_NORM}
MAX_LAYERS = 10_000
"""Far above any model, and few enough to name every tensor of one."""
_NORM_OF = {hf_name: name for name, hf_name in LAYER_NORMS.items()}


class MegatronTensors(ABC):
    """Full tensors of a Megatron checkpoint under the names of `names`, whatever its layout."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor outside the layers."""

    @abstractmethod
    def dtype(self, name: str, layer: int | None) -> torch.dtype:
        """Type of a tensor; of a layer's tensor the name is below ``decoder.layers.N``."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor outside the layers, for example ``output_layer.weight``."""

    @abstractmethod
    def layer_tensor(self, name: str, layer: int) -> torch.Tensor:
        """Read a full tensor of a layer, for example ``mlp.linear_fc2.weight`` of layer 3."""


@dataclass(frozen=True, kw_only=True)
class MegatronSource(ModelSource):
    """A checkpoint of Megatron; see `ModelSource`.

    Attributes:
        tensors: its full tensors under Megatron's names.
    """

    tensors: MegatronTensors
    _last: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse a model in both 16-bit types.

        Raises:
            CheckpointError: names the tensors.
        """
        dtypes = {}
        for name in self.shapes():
            local, layer = _find_megatron_name(name)
            full = local if layer is None else f"decoder.layers.{layer}.{local}"
            dtypes[full] = self.tensors.dtype(local, layer)
        if mixed := find_mixed_types(dtypes):
            raise CheckpointError(
                f"checkpoint={self.path}: {mixed}. The checkpoint is damaged; use another one."
            )

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return self.tensors.dtype(*_find_megatron_name(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor; parts of a fused weight are best read one after the other."""
        if name in (HF_EMBEDDING, HF_OUTPUT):
            padded = self.padded_tensor(name)
            if padded.shape[0] < self.vocab_size:
                raise CheckpointError(
                    f"vocab_size={self.vocab_size}: {_WHOLE[name]} has {padded.shape[0]} rows. The "
                    "checkpoint is damaged; use another one."
                )
            return padded[: self.vocab_size]
        megatron_name, layer = _find_megatron_name(name)
        if layer is None:
            return self.tensors.tensor(megatron_name)
        projection = find_projection(name)
        if projection is None:
            return self.tensors.layer_tensor(megatron_name, layer)
        key = f"{layer}.{megatron_name}"
        if key not in self._last:
            self._last.clear()
            fused = self.tensors.layer_tensor(megatron_name, layer)
            self._last[key] = projection.linear.split(fused, self.model)
        return self._last[key][projection.linear.hf_names.index(projection.name)]

    def padded_tensor(self, name: str) -> torch.Tensor:
        """Read the embedding or the output layer with its padding."""
        return self.tensors.tensor(_WHOLE[name])


def _find_megatron_name(hf_name: str) -> tuple[str, int | None]:
    """Return Megatron's name and, inside the layers, the global layer number."""
    if hf_name in _WHOLE:
        return _WHOLE[hf_name], None
    projection = find_projection(hf_name)
    if projection is not None:
        return f"{projection.linear.name}.weight", projection.layer
    _, _, layer, local = hf_name.split(".", 3)
    return _NORM_OF[local], int(layer)


def refuse_dtype(dtype: torch.dtype, name: str, path: Path) -> None:
    """Refuse a tensor that is of no type of weights.

    Raises:
        CheckpointError: names it.
    """
    if dtype not in WEIGHT_DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in WEIGHT_DTYPES)
        raise CheckpointError(
            f"checkpoint={path}: {name} is {str(dtype).removeprefix('torch.')}, weights are of "
            f"{known}. Convert it to one of these first."
        )


def megatron_shapes(model: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Return Megatron's name -> full shape of every tensor, layers numbered from 0.

    Args:
        model: the architecture.
        rows: of the embedding, with its padding.

    Raises:
        CheckpointError: more layers than any model has.
    """
    if model.num_layers > MAX_LAYERS:
        raise CheckpointError(
            f"num_layers={model.num_layers}: no model has more than {MAX_LAYERS}. The checkpoint "
            "is damaged; use another one."
        )
    hidden = model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, hidden)}
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        shapes |= {f"{prefix}{linear.name}.weight": linear.shape(model) for linear in LINEARS}
        shapes |= {prefix + name: (hidden,) for name in LAYER_NORMS}
    shapes[FINAL_NORM] = (hidden,)
    if not model.share_embeddings_and_output_weights:
        shapes[OUTPUT] = (rows, hidden)
    return shapes


def compare_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Refuse tensors that are not those of a model.

    Args:
        found, wanted: Megatron's name -> full shape.
        path: the checkpoint.

    Raises:
        CheckpointError: names the first five that are absent, too many or of another shape.
    """
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(found[name])}, the model's has {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"checkpoint={path}: is not the model it says: {'; '.join(problems[:5])}{more}. It is "
            "damaged, or a model that is not converted here."
        )
