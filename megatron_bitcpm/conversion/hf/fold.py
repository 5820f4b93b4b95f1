"""MiniCPM as a plain Llama: its constants multiplied into the weights, see `arch.folding`.

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

import torch

from megatron_bitcpm.arch.folding import find_folding, plain_llama
from megatron_bitcpm.arch.tensors import EMBEDDING, OUTPUT, find_tensor
from megatron_bitcpm.conversion.codes import count_not_finite
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.errors import CheckpointError

_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FoldedSource(ModelSource):
    """A MiniCPM, `inner`, read as a plain Llama; made by `fold`."""

    inner: ModelSource
    rounding: dict[str, float] = field(default_factory=dict)
    """Tensor -> its largest relative rounding error, of those read so far."""

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return self.inner.dtype(self._inner_name(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of the plain Llama; of a latent model the values on the grid."""
        tensor = self.inner.forward_tensor(self._inner_name(name))
        place = find_tensor(name)
        assert place is not None and self.folding is not None
        factor = self.folding.factor(place)
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
        return EMBEDDING.hf if name == OUTPUT.hf and tied else name


def fold(source: ModelSource) -> FoldedSource:
    """Return a MiniCPM as a plain Llama."""
    assert source.model.has_constants, source.path
    inherited = {f.name: getattr(source, f.name) for f in fields(ModelSource)}
    changed = {
        "form": "pseudo" if source.form == "latent" else source.form,
        "model": plain_llama(source.model),
        "folding": find_folding(source.model),
        "inner": source,
    }
    return FoldedSource(**inherited | changed)


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
        # 0 / 0 is a zero that stayed one. A value that is not finite gives NaN too: the check of
        # what is written finds it.
        largest = max(largest, float(error.nan_to_num_(0.0, math.inf).amax()))
        lost = bool(((source != 0) & (target == 0)).any())
        if lost or (count_not_finite(target) and not count_not_finite(source)):
            largest = math.inf
    return folded, largest
