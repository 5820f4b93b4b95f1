"""RMSNorm with statistics in float32, the same code for every layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, over the last dimension.

    As Llama has it: normalised in float32, rounded to the type of x, multiplied by the weight.
    Megatron's own wrapper refuses sequence parallelism, where the weight's gradient is a sum over
    the tensor ranks; the mark on the weight asks Megatron for it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        divisor: float = 1.0,
        **unused: Any,
    ) -> None:
        """Create the weight, all ones; the output is divided by `divisor`."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps
        self.divisor = divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x, any shape that ends in hidden_size."""
        normalised = torch.nn.functional.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        output = self.weight * normalised.to(x.dtype)
        return output if self.divisor == 1 else output / self.divisor
