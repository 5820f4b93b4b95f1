"""A model of any format, read one tensor at a time under Hugging Face's names.

Three forms a model can have:

* ``latent``: the trained parameters of a quantised model; its forward quantises them;
* ``pseudo``: the values of that forward, every group on its grid;
* ``plain``: a model in full precision, without a quantiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.conversion.difference import list_first
from megatron_bitcpm.conversion.names import find_projection, hf_shapes
from megatron_bitcpm.conversion.stamp import (
    QuantizerStamp,
    fake_quantize_projection,
    list_quantized_tensors,
)

Form = Literal["latent", "pseudo", "plain"]
Kind = Literal["torch_dist", "legacy", "hf"]


def find_mixed_types(dtypes: Mapping[str, torch.dtype]) -> str | None:
    """Return what is wrong with a model in both 16-bit types, None where it is not.

    Nobody stores one: a type in a header was changed, not the values.

    Args:
        dtypes: name of a tensor -> its type.
    """
    names = {
        dtype: [name for name, found in dtypes.items() if found == dtype]
        for dtype in (torch.float16, torch.bfloat16)
    }
    few, many = sorted(names, key=lambda dtype: len(names[dtype]))
    if not names[few]:
        return None
    return (
        f"{list_first(names[few], 'tensors')}: of type {str(few).removeprefix('torch.')} among "
        f"{len(names[many])} of {str(many).removeprefix('torch.')}"
    )


@dataclass(frozen=True)
class Folding:
    """MiniCPM's constants that were multiplied into the weights of a plain Llama; see `fold`.

    Attributes:
        scale_emb: factor of the embedding's rows.
        residual: factor of o_proj and down_proj, scale_depth / sqrt(layers).
        output: factor of lm_head, dim_model_base / hidden_size.
        scale_depth, dim_model_base: what the last two were made of.
    """

    scale_emb: float
    residual: float
    output: float
    scale_depth: float
    dim_model_base: int


@dataclass(frozen=True, kw_only=True)
class ModelSource(ABC):
    """A model on disk; opened by `open_source`.

    Attributes:
        path: what was opened.
        kind: torch_dist or legacy (Megatron), hf.
        form: see the module.
        model: the architecture; of a folded MiniCPM that of the plain Llama.
        vocab_size: ids, without rows that only pad.
        stamp: the quantiser that trained a latent or pseudo model.
        folding: set when the model is a folded MiniCPM.
        facts: what is known of the training: iteration, tokens, seq_length, valid_loss, ...
        side_files: folder whose tokenizer, chat template and generation settings belong to the
            model; None where there is none.
    """

    path: Path
    kind: Kind
    form: Form
    model: ModelConfig
    vocab_size: int
    stamp: QuantizerStamp | None = None
    folding: Folding | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    side_files: Path | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return Hugging Face name -> shape of every tensor, in the order of the layers."""
        return hf_shapes(self.model, self.vocab_size)

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """Read a stored tensor; it may lie in a mapped file: never write to it.

        Args:
            name: one of `shapes`.

        Raises:
            CheckpointError: absent, or its file is damaged; names the file and the tensor.
        """

    def padded_tensor(self, name: str) -> torch.Tensor:
        """Read the embedding or the output layer with the rows that only pad it, if it has any."""
        return self.tensor(name)

    def quantized_tensors(self) -> dict[str, int]:
        """Return the tensors on a grid, or to be quantised: name -> weights per scale."""
        return list_quantized_tensors(self.shapes(), self.model.num_layers, self.stamp)

    def forward_tensor(self, name: str) -> torch.Tensor:
        """Read what the forward multiplies with: the values on the grid, for a latent model too."""
        tensor = self.tensor(name)
        projection = find_projection(name)
        if (
            self.form != "latent"
            or projection is None
            or self.stamp is None
            or not self.stamp.quantizes(projection, self.model.num_layers)
        ):
            return tensor
        return fake_quantize_projection(tensor, projection, self.stamp)
