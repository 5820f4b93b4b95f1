"""BitCPM: a Llama or MiniCPM decoder whose linears see quantised weights.

The folder's tensors are the latent weights: what an optimizer updates. In every forward pass each
quantised linear rounds its weight to a grid of a few levels times one scale per group of inputs,
and multiplies with that; in the backward pass the gradient goes straight through to the latent
weight. So fine-tuning with this file keeps the model on its grid. Parameters have Llama's names,
and there are no others.

    LinearQuantizer, SteTernaryQuantizer    the fake quantiser
    BitCPMForCausalLM                       the model with it; settings in config.json under
                                            ``bitcpm_quantizer``
    MiniCPMForCausalLM                      the model without it

Needs torch and transformers (4.57 or 5). The numbers are those of megatron_bitcpm, bit for bit: one
order of summation, float32 arithmetic, no rounding in between.

Shape legend: O outputs, I inputs, G groups per row, n inputs per group.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

# Grid -> (levels of weights >= 0, levels of weights < 0, divisor). Levels are in units of the
# scale, which is max |w| / divisor, or the mean of |w| where there is no divisor.
GRIDS: dict[str, tuple[tuple[float, ...], tuple[float, ...], float | None]] = {
    "ternary": ((0, 1), (0, -1), None),
    "asym4": ((0, 1), (0, -1, -2), 1.5),
    "half_sym4": ((0.5, 1.5), (-0.5, -1.5), 1.5),
    "int_sym4": ((1, 2), (-1, -2), 2.0),
    "five": ((0, 1, 2), (0, -1, -2), 2.0),
}
LANES = 64
FORMAT_VERSION = 1


def sum_canonical(magnitude: torch.Tensor) -> torch.Tensor:
    """Sum float32 values >= 0 over the last dimension, kept with size 1, in one fixed order.

    64 lanes: lane j adds the entries j, j + 64, j + 128, ... one after the other; then neighbouring
    lanes are added until one is left. Another order gives other scales, and other codes.
    """
    missing = -magnitude.shape[-1] % LANES
    if missing:
        magnitude = F.pad(magnitude, (0, missing))
    lanes, *blocks = magnitude.split(LANES, -1)
    for block in blocks:
        lanes = lanes + block
    while lanes.shape[-1] > 1:
        lanes = lanes[..., 0::2] + lanes[..., 1::2]
    return lanes


def sum_in_slices(magnitude: torch.Tensor, slices: int) -> torch.Tensor:
    """Sum equal slices of the last dimension and add the sums, first to last."""
    total, *others = [sum_canonical(part) for part in magnitude.chunk(slices, -1)]
    for part in others:
        total = total + part
    return total


def constant(value: float, like: torch.Tensor) -> torch.Tensor:
    """Return a number in the type of `like`; some devices keep Python numbers in double."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


class WeightQuantizer:
    """The fake quantiser of one linear.

    Attributes:
        grid: one of `GRIDS`.
        numerics: "fp32", or "bf16_reciprocal" (arithmetic in the type of the weight).
        eps: smallest scale.
        group_size: inputs per scale, or "tensor" for one scale per weight.
        slices: equal parts of a row that tensor-parallel training held on different devices.
    """

    def __init__(
        self, grid: str, numerics: str, eps: float, group_size: int | str, slices: int
    ) -> None:
        known = ("fp32", "bf16_reciprocal") if grid == "ternary" else ("fp32",)
        if grid not in GRIDS or numerics not in known:
            raise ValueError(f"bitcpm_quantizer: no grid {grid!r} with numerics {numerics!r}")
        self.grid, self.numerics, self.eps = grid, numerics, eps
        self.group_size, self.slices = group_size, slices

    def __call__(self, w_OI: torch.Tensor) -> torch.Tensor:
        """Return the values on the grid, [O, I], in the type of w; NaN where a group has one."""
        if self.numerics == "bf16_reciprocal" and w_OI.dtype == torch.float16:
            raise ValueError("bitcpm_quantizer: bf16_reciprocal needs bfloat16 or float32 weights")
        group_size = w_OI.shape[1] if self.group_size == "tensor" else int(self.group_size)
        w_OGn = w_OI.unflatten(1, (-1, group_size))
        magnitude_OGn = w_OGn.abs().to(torch.float32)
        scale = self._scale(magnitude_OGn, w_OI.dtype)
        if self.numerics == "bf16_reciprocal":
            # Each step rounds to the type of w. Adding 0 turns -0 into +0.
            wq_OGn = ((w_OGn * scale.reciprocal()).round().clamp(-1, 1) + 0.0) * scale
        else:
            wq_OGn = self._nearest(w_OGn, magnitude_OGn, scale)
        return wq_OGn.masked_fill_(~scale.isfinite(), math.nan).flatten(1)

    def _scale(self, magnitude_OGn: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return [O, G, 1], or [1, 1, 1] for the whole tensor."""
        tensor = self.group_size == "tensor"
        divisor = GRIDS[self.grid][2]
        if divisor is not None:
            largest = magnitude_OGn.amax((0, 1, 2) if tensor else 2, keepdim=True)
            scale = largest / constant(divisor, largest)
        else:
            # Only a group as long as the row lies in several slices.
            slices = self.slices if magnitude_OGn.shape[1] == 1 else 1
            sums, n = sum_in_slices(magnitude_OGn, slices), magnitude_OGn.shape[2]
            if tensor:
                sums, n = sum_canonical(sums.view(1, 1, -1)), magnitude_OGn.numel()
            scale = sums * constant(1.0 / n, sums)
        if self.numerics == "bf16_reciprocal":
            scale = scale.to(dtype)
        return scale.clamp(min=constant(self.eps, scale))

    def _nearest(
        self, w_OGn: torch.Tensor, magnitude_OGn: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Return the value of the nearest level; on a midpoint that of the smaller one."""
        positive, negative, _ = GRIDS[self.grid]
        factor = 0.5
        if self.grid == "ternary":
            # |w| > s / 2 as 2 |w| > s, which is exact for the smallest scales too.
            magnitude_OGn, factor = magnitude_OGn.mul_(2), 1.0

        def values(levels: tuple[float, ...]) -> torch.Tensor:
            result = (scale * levels[0]).to(w_OGn.dtype)
            for low, high in pairwise(levels):
                above = magnitude_OGn > scale * (abs(low + high) * factor)
                result = torch.where(above, (scale * high).to(w_OGn.dtype), result)
            return result

        return torch.where(w_OGn < 0, values(negative), values(positive))


class SteTernaryQuantizer(torch.autograd.Function):
    """Values on the grid in the forward pass, identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, quantizer: WeightQuantizer) -> torch.Tensor:
        """Return what the linear multiplies with; exactly on the grid."""
        return quantizer(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The latent weight gets the gradient of the quantised one."""
        return grad, None


class SteActivationQuantizer(torch.autograd.Function):
    """Inputs of a linear on an int8 grid, one scale per token and slice; identity backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slices: int) -> torch.Tensor:
        """Round x, [..., I], to 256 levels of absmax / 127."""
        x32 = x.to(torch.float32).unflatten(-1, (slices, -1))
        largest = x32.abs().amax(-1, keepdim=True)
        scale = largest.clamp(min=1e-5).reciprocal() * 127
        x_q = ((x32 * scale).round().clamp(-128, 127) / scale).to(x.dtype)
        return x_q.masked_fill(~largest.isfinite(), math.nan).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Pass the gradient on."""
        return grad, None


class LinearQuantizer(nn.Linear):
    """A linear without bias that multiplies with its quantised weight.

    Attributes:
        weight: the latent weight, [O, I].
        quantizer: how it is rounded.
        activation: "none", or "int8_per_token" to round the input too.
    """

    def __init__(
        self, in_features: int, out_features: int, quantizer: WeightQuantizer, activation: str
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        if activation not in ("none", "int8_per_token"):
            raise ValueError(f"bitcpm_quantizer: unknown activation {activation!r}")
        self.quantizer, self.activation = quantizer, activation

    def quantized_weight(self) -> torch.Tensor:
        """Return the values of the forward pass, [O, I]; gradients reach the latent weight."""
        wq: torch.Tensor = SteTernaryQuantizer.apply(self.weight, self.quantizer)
        return wq

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x wq^T."""
        if self.activation == "int8_per_token":
            x = SteActivationQuantizer.apply(x, self.quantizer.slices)
        return F.linear(x, self.quantized_weight())


class MiniCPMConfig(LlamaConfig):
    """Llama's configuration and the three constants of MiniCPM.

    Attributes:
        scale_emb: factor of the embedding.
        scale_depth: what a block adds is multiplied by this / sqrt(layers); None: by 1.
        dim_model_base: logits are divided by hidden_size / this; None: by 1.
    """

    model_type = "minicpm"

    def __init__(
        self,
        scale_emb: float = 1.0,
        scale_depth: float | None = None,
        dim_model_base: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scale_emb = scale_emb
        self.scale_depth = scale_depth
        self.dim_model_base = dim_model_base

    @property
    def residual_scale(self) -> float:
        """Factor of what a block adds to the residual stream."""
        if self.scale_depth is None:
            return 1.0
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logits_divisor(self) -> float:
        """Divisor of the last hidden state before the output layer."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base


class BitCPMConfig(MiniCPMConfig):
    """Configuration of a quantised Llama or MiniCPM.

    Attributes:
        bitcpm_quantizer: ``quantizer``, the settings of the training; ``projections``, for each
            projection of a layer its group_size and slices, see `WeightQuantizer`;
            ``full_precision``, the linears that are not quantised.
    """

    model_type = "bitcpm"

    def __init__(self, bitcpm_quantizer: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bitcpm_quantizer = bitcpm_quantizer


class MiniCPMEmbedding(nn.Embedding):
    """An embedding times a constant; the output layer may share its weight."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.scale = config.scale_emb

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the scaled rows of the ids."""
        return super().forward(ids) * self.scale


class MiniCPMNorm(LlamaRMSNorm):
    """The last norm; its output, divided by a constant, goes to the output layer alone."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__(config.hidden_size, eps=config.rms_norm_eps)
        self.divisor = config.logits_divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension, and divide."""
        return super().forward(x) / self.divisor


class MiniCPMDecoderLayer(LlamaDecoderLayer):
    """Llama's layer; what its two blocks add is scaled."""

    def __init__(self, config: MiniCPMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.residual_scale = config.residual_scale
        quantizer = getattr(config, "bitcpm_quantizer", None)
        if quantizer is not None:
            quantize_projections(self, layer_idx, quantizer)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Apply attention, then the MLP."""
        added, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + added * self.residual_scale
        added = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + added * self.residual_scale


def quantize_projections(layer: nn.Module, layer_idx: int, settings: dict[str, Any]) -> None:
    """Put `LinearQuantizer`s in the place of a layer's linears.

    Args:
        layer: a decoder layer.
        layer_idx: its number.
        settings: ``bitcpm_quantizer`` of config.json.
    """
    common = settings["quantizer"]
    for name, groups in settings["projections"].items():
        if f"model.layers.{layer_idx}.{name}" in settings["full_precision"]:
            continue
        quantizer = WeightQuantizer(common["grid"], common["numerics"], common["eps"], **groups)
        linear = layer.get_submodule(name)
        block, _, attribute = name.rpartition(".")
        setattr(
            layer.get_submodule(block),
            attribute,
            LinearQuantizer(
                linear.in_features, linear.out_features, quantizer, common["activation"]
            ),
        )


class MiniCPMModel(LlamaModel):
    """The decoder without its output layer."""

    config_class = MiniCPMConfig
    _no_split_modules = ["MiniCPMDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: MiniCPMConfig) -> None:
        # Not Llama's own constructor, which would build its layers first.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = MiniCPMEmbedding(config)
        self.layers = nn.ModuleList(
            MiniCPMDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = MiniCPMNorm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MiniCPMForCausalLM(LlamaForCausalLM):
    """MiniCPM with its output layer."""

    config_class = MiniCPMConfig
    _no_split_modules = ["MiniCPMDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: MiniCPMConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = MiniCPMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class BitCPMForCausalLM(MiniCPMForCausalLM):
    """A Llama or MiniCPM that quantises its linears in every forward pass."""

    config_class = BitCPMConfig

    def __init__(self, config: BitCPMConfig) -> None:
        block = config.bitcpm_quantizer or {}
        if block.get("format_version") != FORMAT_VERSION or block.get("form") != "latent":
            raise ValueError(
                "config.json: bitcpm_quantizer is absent or of another version: the latent weights "
                "are no model without it. Use the config.json that came with them."
            )
        super().__init__(config)
