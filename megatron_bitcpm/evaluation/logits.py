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
from megatron_bitcpm.arch.tensors import EMBEDDING, Place, find_tensor
from megatron_bitcpm.config import ParallelConfig
from megatron_bitcpm.conversion.megatron.source import MegatronSource
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quantizer import Quantizer


@contextmanager
def megatron_model(checkpoint: str | Path | MegatronSource) -> Iterator[torch.nn.Module]:
    """Hold a checkpoint's GPTModel in float32, with the weights of its forward, on one rank."""
    from megatron_bitcpm.training.runtime import start_runtime

    source = checkpoint if isinstance(checkpoint, MegatronSource) else open_megatron(checkpoint)
    with start_runtime(ParallelConfig(), seed=0) as runtime:
        from megatron_bitcpm.models.decoder import Decoder, build_transformer_config

        model, quantizer = source.model, source.quantizer
        built = Decoder(
            build_transformer_config(model, ParallelConfig(), torch.float32),
            model,
            source.padded_tensor(EMBEDDING.hf).shape[0],
            source.facts.get("seq_length") or model.max_position_embeddings,
        )
        _fill(built, source)
        if quantizer is not None and quantizer.config.activation == "int8_per_token":
            _round_inputs(built, quantizer)
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
    for name, parameter in built.named_parameters():
        place = find_tensor(name, "megatron")
        assert place is not None, name
        value = source.tensors.tensor(place.spec, place.layer)
        if place.spec.role == "projection":
            value = _forward_fused(value, place, source)
        assert value.shape == parameter.shape, name
        parameter.copy_(value)


def _forward_fused(w_OI: torch.Tensor, place: Place, source: MegatronSource) -> torch.Tensor:
    """Return what the forward multiplies with, rows in Megatron's order."""
    wq_OI = torch.empty_like(w_OI)
    # A scale never spans rows, except with one scale per projection: so this does not depend on
    # which rows are taken for which projection's.
    rows = place.spec.split(torch.arange(len(w_OI)), source.model.dimensions())
    for part, rows_N in enumerate(rows):
        name = Place(place.spec, part, place.layer).name("hf")
        wq_OI[rows_N] = source.forward_tensor(name)
    return wq_OI


def _round_inputs(built: Any, quantizer: Quantizer) -> None:
    """Round what enters the ternary linears, in the slices that the ranks of the training held."""
    num_layers = len(built.decoder.layers)
    for name, module in built.named_modules():
        place = find_tensor(f"{name}.weight", "megatron")
        if place is None or place.spec.role != "projection":
            continue
        if quantizer.quantizes(place, num_layers):
            slices = quantizer.tp_size if place.spec.row_parallel else 1
            module.register_forward_pre_hook(functools.partial(_round_input, slices))


def _round_input(slices: int, _: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = inputs
    return ops.int8_per_token(x.unflatten(-1, (slices, -1))).flatten(-2), *rest


@torch.no_grad()
def megatron_logits(model: torch.nn.Module, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Return float32 logits, [B, S, V], of `megatron_model`; V with the embedding's padding."""
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    return model(tokens_BS, positions_BS, None)


def follow_length(model: Any, source: MegatronSource, length: int) -> None:
    """Choose LongRoPE's factors by the tokens of a sequence, as transformers does, not the run."""
    from megatron_bitcpm.models.rope import RotaryAngles

    model.rotary_pos_emb = RotaryAngles(source.model, length)
