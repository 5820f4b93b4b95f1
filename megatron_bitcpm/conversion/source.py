"""A model of any format, read one tensor at a time under Hugging Face's names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from megatron_bitcpm.arch.folding import Folding
from megatron_bitcpm.arch.model import Form, ModelConfig, shapes_of
from megatron_bitcpm.arch.tensors import Place, Shape, find_projection
from megatron_bitcpm.conversion.codes import read_scales
from megatron_bitcpm.conversion.difference import list_first
from megatron_bitcpm.conversion.tensor_stream import dtype_name
from megatron_bitcpm.quant.settings import BF16_RECIPROCAL, FP32
from megatron_bitcpm.quantizer import Quantizer

Kind = Literal["torch_dist", "legacy", "hf", "file"]
S = TypeVar("S", bound="TensorSource")


@dataclass(frozen=True, kw_only=True)
class TensorSource(ABC):
    """Tensors on disk, of a whole model or of one file.

    Attributes:
        path: what was opened.
        kind: torch_dist or legacy (Megatron), hf, or file.
        form: see `arch.model.Form`.
        quantizer: the one that trained a latent or pseudo model.
        folding: set when the model is a folded MiniCPM.
        facts: what is known of the training: iteration, tokens, seq_length, valid_loss, ...
    """

    path: Path
    kind: Kind
    form: Form
    quantizer: Quantizer | None = None
    folding: Folding | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Layers of the whole model."""

    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Return Hugging Face name -> shape of every tensor, in the order of the layers."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """Read a stored tensor; it may lie in a mapped file: never write to it.

        Raises:
            CheckpointError: absent, or its file is damaged; names the file and the tensor.
        """

    def quantized_tensors(self) -> dict[str, int]:
        """Return the tensors on a grid, or to be quantised: name -> weights per scale."""
        if self.quantizer is None:
            return {}
        return self.quantizer.tensors(self.shapes(), self.num_layers)

    def forward_tensor(self, name: str) -> torch.Tensor:
        """Read what the forward multiplies with: the values on the grid, for a latent model too."""
        tensor, place = self.tensor(name), self._quantized(name)
        if place is None or self.form != "latent" or self.quantizer is None:
            return tensor
        return self.quantizer.values(tensor.contiguous(), place.spec)

    def codes_scales(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes, int8 [O, I], and scales, float32 [O, G], of a quantised tensor.

        Of a pseudo-quantised model they are read out of the values, the scales as these were
        rounded; its values must be on the grid.
        """
        tensor, place = self.tensor(name), self._quantized(name)
        assert place is not None and self.quantizer is not None, name
        if self.form == "latent":
            return self.quantizer.codes_scales(tensor.contiguous(), place.spec)
        size = self.quantizer.weights_per_scale(place, tuple(tensor.shape))
        return read_scales(tensor, size, self.quantizer.grid, self.quantizer.config.eps)

    def with_other_numerics(self: S) -> S | None:
        """Return the same latents under the other arithmetic; None where that does not exist."""
        assert self.quantizer is not None
        numerics = BF16_RECIPROCAL if self.quantizer.numerics == FP32 else FP32
        has_float16 = any(self.dtype(name) == torch.float16 for name in self.quantized_tensors())
        if has_float16 or not self.quantizer.has_numerics(numerics):
            return None
        return replace(self, quantizer=replace(self.quantizer, numerics=numerics))

    def _quantized(self, name: str) -> Place | None:
        place = find_projection(name)
        if place is None or self.quantizer is None:
            return None
        return place if self.quantizer.quantizes(place, self.num_layers) else None


@dataclass(frozen=True, kw_only=True)
class ModelSource(TensorSource):
    """A model on disk; opened by `open_source`.

    Attributes:
        model: the architecture; of a folded MiniCPM that of the plain Llama.
        vocab_size: ids, without rows that only pad.
        side_files: folder with the model's tokenizer, chat template and generation settings.
    """

    model: ModelConfig
    vocab_size: int
    side_files: Path | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.model.num_layers

    def shapes(self) -> dict[str, Shape]:
        """Return Hugging Face name -> shape of every tensor, in the order of the layers."""
        return shapes_of(self.model, self.vocab_size)

    def padded_tensor(self, name: str) -> torch.Tensor:
        """Read the embedding or the output layer with the rows that only pad it, if it has any."""
        return self.tensor(name)


def find_mixed_types(dtypes: Mapping[str, torch.dtype]) -> str | None:
    """Return what is wrong with a model in both 16-bit types, None where it is not.

    Nobody stores one: a type in a header was changed, not the values.
    """
    names = {
        dtype: [name for name, found in dtypes.items() if found == dtype]
        for dtype in (torch.float16, torch.bfloat16)
    }
    few, many = sorted(names, key=lambda dtype: len(names[dtype]))
    if not names[few]:
        return None
    return (
        f"{list_first(names[few], 'tensors')}: of type {dtype_name(few)} among "
        f"{len(names[many])} of {dtype_name(many)}"
    )
