"""Logits of a checkpoint's model in Megatron, and their comparison with transformers.

The model is built as a stock GPTModel in float32 on one rank and filled with the matrices that the
training forward multiplied with. Fused weights go in as Megatron stores them, so that a wrong split
in the exported folder shows up as other logits. What the training rounded to 8 bits in front of the
ternary linears is rounded here too; a Hugging Face folder has no such step, so of such a checkpoint
the difference measures what leaving it out does.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm import ops
from megatron_bitcpm.config import ParallelConfig
from megatron_bitcpm.conversion.megatron.source import MegatronSource
from megatron_bitcpm.conversion.names import (
    EMBEDDING,
    FINAL_NORM,
    HF_EMBEDDING,
    HF_OUTPUT,
    LINEARS,
    OUTPUT,
    FusedLinear,
    Projection,
)
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.stamp import QuantizerStamp
from megatron_bitcpm.errors import CheckpointError

# Megatron stores the norm in front of a linear under the linear's name.
_STORED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@contextmanager
def megatron_model(checkpoint: str | Path | MegatronSource) -> Iterator[torch.nn.Module]:
    """Hold a checkpoint's GPTModel in float32, with the weights of its forward, on one rank.

    Args:
        checkpoint: of any of Megatron's formats, a run's folder, or one that is open.
    """
    from megatron_bitcpm.training.runtime import start_runtime

    source = checkpoint if isinstance(checkpoint, MegatronSource) else open_megatron(checkpoint)
    with start_runtime(ParallelConfig(), seed=0) as runtime:
        from megatron_bitcpm.models.decoder import build_model, build_transformer_config

        model, stamp = source.model, source.stamp
        built = build_model(
            build_transformer_config(model, ParallelConfig(), torch.float32),
            model,
            source.padded_tensor(HF_EMBEDDING).shape[0],
            source.facts.get("seq_length") or model.max_position_embeddings,
        )
        _fill(built, source)
        if stamp is not None and stamp.quant.activation == "int8_per_token":
            _round_inputs(built, stamp)
        yield built.to(runtime.device).eval()


def open_megatron(checkpoint: str | Path) -> MegatronSource:
    """Open a Megatron checkpoint, and nothing else."""
    source = open_source(checkpoint)
    if not isinstance(source, MegatronSource):
        raise CheckpointError(
            f"checkpoint={checkpoint}: is not a Megatron checkpoint. Name one, or compare Hugging "
            "Face folders with bitcpm verify --logits."
        )
    return source


@torch.no_grad()
def _fill(built: torch.nn.Module, source: MegatronSource) -> None:
    linears = {f"{linear.name}.weight": linear for linear in LINEARS}
    outside = {EMBEDDING: HF_EMBEDDING, OUTPUT: HF_OUTPUT}
    for name, parameter in built.named_parameters():
        if name.startswith("decoder.layers."):
            number, _, local = name.removeprefix("decoder.layers.").partition(".")
            layer = int(number)
            value = source.tensors.layer_tensor(_STORED_NORMS.get(local, local), layer)
            if source.form == "latent" and local in linears:
                value = _quantize_fused(value, linears[local], layer, source)
        elif name in outside:
            value = source.padded_tensor(outside[name])
        else:
            assert name == FINAL_NORM, name
            value = source.tensors.tensor(name)
        assert value.shape == parameter.shape, name
        parameter.copy_(value)


def _quantize_fused(
    w_OI: torch.Tensor, linear: FusedLinear, layer: int, source: MegatronSource
) -> torch.Tensor:
    """Return what the forward multiplies with, rows in Megatron's order.

    A scale never spans rows, except with one scale per projection: so this does not depend on which
    rows are taken for which projection's.
    """
    wq_OI = torch.empty_like(w_OI)
    rows = linear.split(torch.arange(w_OI.shape[0]), source.model)
    for hf_name, rows_N in zip(linear.hf_names, rows, strict=True):
        wq_OI[rows_N] = source.forward_tensor(f"model.layers.{layer}.{hf_name}.weight")
    return wq_OI


def _round_inputs(built: Any, stamp: QuantizerStamp) -> None:
    """Round what enters the ternary linears, in the slices that the ranks of the training held."""
    layers = built.decoder.layers
    for number, layer in enumerate(layers):
        for linear in LINEARS:
            projection = Projection(number, linear.hf_names[0], linear)
            if stamp.quantizes(projection, len(layers)):
                slices = stamp.tp_size if linear.row_parallel else 1
                hook = functools.partial(_round_input, slices)
                layer.get_submodule(linear.name).register_forward_pre_hook(hook)


def _round_input(slices: int, _: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = inputs
    return ops.int8_per_token(x.unflatten(-1, (slices, -1))).flatten(-2), *rest


@torch.no_grad()
def megatron_logits(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return float32 logits, [B, S, V], of `megatron_model`; V with the embedding's padding.

    With LongRoPE the run's sequence length chose between its two arrays of factors; `follow_length`
    chooses as transformers does.
    """
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    logits: torch.Tensor = model(tokens_BS, positions_BS, None)
    return logits


def follow_length(model: Any, source: MegatronSource, length: int) -> None:
    """Choose LongRoPE's factors by the length of the sequences to come, in tokens."""
    from megatron_bitcpm.models.rope import RotaryAngles

    model.rotary_pos_emb = RotaryAngles(source.model, length)
