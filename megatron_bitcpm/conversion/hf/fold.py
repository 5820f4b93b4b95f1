"""MiniCPM as a plain Llama: its three constants multiplied into the weights.

    model.embed_tokens        x scale_emb
    o_proj, down_proj         x scale_depth / sqrt(layers)
    lm_head                   x dim_model_base / hidden_size

The factors go onto the values that the forward multiplies with, in float32, rounded once to their
type. A factor is one number for a whole tensor, so values that were equal stay equal and zeros stay
zeros: codes and groups are those of the MiniCPM, scales, embedding and output layer are rounded.
Hence it is one-way: the record of the factors says what was done, it does not undo it. Latent
weights are never folded. Tied embeddings have two factors, so the output layer becomes a tensor of
its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.conversion.names import HF_EMBEDDING, HF_OUTPUT, find_projection
from megatron_bitcpm.conversion.source import Folding, ModelSource
from megatron_bitcpm.conversion.tensor_stream import is_finite
from megatron_bitcpm.errors import CheckpointError

_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FoldedSource(ModelSource):
    """A MiniCPM read as a plain Llama; made by `fold`.

    Attributes:
        inner: the MiniCPM.
        rounding: tensor -> its largest relative rounding error, of those read so far.
    """

    inner: ModelSource
    rounding: dict[str, float] = field(default_factory=dict)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return self.inner.dtype(self._inner_name(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of the plain Llama; of a latent model the values on the grid."""
        tensor = self.inner.forward_tensor(self._inner_name(name))
        factor = self._factor(name)
        if factor is None:
            return tensor
        folded, error = _scale(tensor, factor)
        # Half a unit in the last place; more means that values left the type's normal range.
        if error > torch.finfo(tensor.dtype).eps / 2 * 1.001:
            raise CheckpointError(
                f"architecture=llama: {name} x {factor:.6g} has values that {tensor.dtype} cannot "
                f"hold, in {self.path}. Write it as minicpm."
            )
        self.rounding[name] = error
        return folded

    def _inner_name(self, name: str) -> str:
        tied = self.inner.model.share_embeddings_and_output_weights
        return HF_EMBEDDING if name == HF_OUTPUT and tied else name

    def _factor(self, name: str) -> float | None:
        assert self.folding is not None
        if name == HF_EMBEDDING:
            return self.folding.scale_emb
        if name == HF_OUTPUT:
            return self.folding.output
        projection = find_projection(name)
        if projection is not None and projection.linear.row_parallel:
            return self.folding.residual
        return None


def fold(source: ModelSource) -> FoldedSource:
    """Return a MiniCPM as a plain Llama.

    Raises:
        CheckpointError: it is no MiniCPM.
    """
    if source.model.architecture != "minicpm":
        raise CheckpointError(
            f"architecture=llama: {source.path} is a {source.model.architecture} already: there is "
            "nothing to fold. Leave --architecture out."
        )
    inherited = {f.name: getattr(source, f.name) for f in fields(ModelSource)}
    return FoldedSource(
        **inherited
        | {
            "form": "pseudo" if source.form == "latent" else source.form,
            "model": _plain_llama(source.model),
            "folding": find_folding(source.model),
            "inner": source,
        }
    )


def find_folding(model: ModelConfig) -> Folding:
    """Return the factors of a MiniCPM; an absent constant has none."""
    scale_depth = model.scale_depth or math.sqrt(model.num_layers)
    dim_model_base = model.dim_model_base or model.hidden_size
    return Folding(
        scale_emb=model.scale_emb or 1.0,
        residual=scale_depth / math.sqrt(model.num_layers),
        output=dim_model_base / model.hidden_size,
        scale_depth=scale_depth,
        dim_model_base=dim_model_base,
    )


def _plain_llama(model: ModelConfig) -> ModelConfig:
    content: dict[str, Any] = model.model_dump() | {
        "architecture": "llama",
        "scale_emb": None,
        "scale_depth": None,
        "dim_model_base": None,
        "share_embeddings_and_output_weights": False,
    }
    return ModelConfig(**content)


def _scale(tensor: torch.Tensor, factor: float) -> tuple[torch.Tensor, float]:
    """Return tensor x factor in its dtype and the largest relative rounding error."""
    factor_fp32 = torch.tensor(factor, dtype=torch.float32)
    folded = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    rows = max(1, _BLOCK // max(1, tensor[0].numel()))
    largest = 0.0
    for source, target in zip(torch.split(tensor, rows), torch.split(folded, rows), strict=True):
        exact = source.float() * factor_fp32
        target.copy_(exact)
        error = (target.float() - exact).abs_() / exact.abs()
        # 0 / 0 is a zero that stayed one. A value that is not finite gives NaN too: `is_finite` of
        # what is written finds it.
        largest = max(largest, float(error.nan_to_num_(0.0, math.inf).amax()))
        lost = bool(((source != 0) & (target == 0)).any())
        if lost or (not is_finite(target) and is_finite(source)):
            largest = math.inf
    return folded, largest
