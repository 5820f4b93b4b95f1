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
from collections.abc import Iterator, Sequence
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
from megatron_bitcpm.conversion.stamp import QuantizerStamp, fake_quantize_projection
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.evaluation.generate import load_hf_model

# Megatron stores the norm in front of a linear under the linear's name.
_STORED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@contextmanager
def megatron_model(
    checkpoint: str | Path | MegatronSource, tokenizer: str | Path | None = None
) -> Iterator[torch.nn.Module]:
    """Hold a checkpoint's model in float32, with the weights of its forward, on one rank.

    Args:
        checkpoint: a Megatron checkpoint of any format, or a run's folder (its newest checkpoint),
            or one that is open.
        tokenizer: tokenizer folder for checkpoints that do not say how many ids it has.
    Yields:
        A GPTModel in evaluation mode; valid inside the block only.

    Raises:
        CheckpointError: no Megatron checkpoint, or it cannot be read or does not fill the model.
    """
    from megatron_bitcpm.training.runtime import start_runtime

    source = checkpoint
    if not isinstance(source, MegatronSource):
        source = open_megatron(source, tokenizer)
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


def open_megatron(checkpoint: str | Path, tokenizer: str | Path | None = None) -> MegatronSource:
    """Open a Megatron checkpoint; arguments and errors as `megatron_model`."""
    source = open_source(checkpoint, tokenizer)
    if not isinstance(source, MegatronSource):
        raise CheckpointError.of(
            "checkpoint", checkpoint, "is no Megatron checkpoint",
            "Name one, or compare Hugging Face folders with bitcpm verify --logits",
        )  # fmt: skip
    return source


@torch.no_grad()
def _fill(built: torch.nn.Module, source: MegatronSource) -> None:
    linears = {f"{linear.name}.weight": linear for linear in LINEARS}
    outside = {EMBEDDING: HF_EMBEDDING, OUTPUT: HF_OUTPUT}
    for name, parameter in built.named_parameters():
        if name.startswith("decoder.layers."):
            number, _, local = name.removeprefix("decoder.layers.").partition(".")
            stored = _STORED_NORMS.get(local, local)
            value = source.tensors.layer_tensor(stored, int(number))
            if local in linears:
                value = _fake_quantize_fused(value, linears[local], int(number), source)
        elif name in outside:
            value = source.padded_tensor(outside[name])
        else:
            assert name == FINAL_NORM, name
            value = source.tensors.tensor(name)
        assert value.shape == parameter.shape, name
        parameter.copy_(value)


def _fake_quantize_fused(
    w_OI: torch.Tensor, linear: FusedLinear, layer: int, source: MegatronSource
) -> torch.Tensor:
    """Return what the forward multiplies with, rows in Megatron's order.

    A scale never spans rows, except with one scale per projection: so this does not depend on which
    rows are taken for which projection's.
    """
    stamp, model = source.stamp, source.model
    first = Projection(layer, linear.hf_names[0], linear)
    if source.form != "latent" or stamp is None or not stamp.quantizes(first, model.num_layers):
        return w_OI
    wq_OI = torch.empty_like(w_OI)
    rows = linear.split(torch.arange(w_OI.shape[0]), model)
    for hf_name, rows_N in zip(linear.hf_names, rows, strict=True):
        projection = Projection(layer, hf_name, linear)
        wq_OI[rows_N] = fake_quantize_projection(w_OI[rows_N], projection, stamp)
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
    """Return float32 logits, [B, S, V], V with the padding of the embedding.

    Args:
        model: from `megatron_model`.
        tokens_BS: ids, int64. With LongRoPE the run's sequence length chose between its two arrays
            of factors; see `follow_length` for the choice of transformers.
    """
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    logits: torch.Tensor = model(tokens_BS, positions_BS, None)
    return logits


def follow_length(model: Any, source: MegatronSource, length: int) -> None:
    """Choose LongRoPE's factors as transformers does: by the length of what is computed.

    Args:
        model: from `megatron_model`.
        source: its checkpoint.
        length: of the sequences to come, in tokens.
    """
    from megatron_bitcpm.models.rope import RotaryAngles

    model.rotary_pos_emb = RotaryAngles(source.model, length)


def decode_greedily(
    model: torch.nn.Module,
    prompt: list[int],
    new_tokens: int,
    vocab_size: int,
    forbidden: Sequence[int] = (),
) -> list[int]:
    """Return the most likely continuation, token by token, each from the whole sequence.

    Args:
        model: from `megatron_model`.
        prompt: ids, at least one.
        new_tokens: ids to add.
        vocab_size: ids of the tokenizer; padding rows are never chosen.
        forbidden: ids that are never chosen, for example the end token.
    """
    ids = list(prompt)
    device = next(model.parameters()).device
    for _ in range(new_tokens):
        logits = megatron_logits(model, torch.tensor([ids], device=device))
        scores_V = logits[0, -1, :vocab_size].clone()
        scores_V[list(forbidden)] = -torch.inf
        ids.append(int(scores_V.argmax()))
    return ids[len(prompt) :]


def _end_ids(model: Any) -> list[int]:
    """Return the end tokens of a model of transformers, at which its generation stops."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


@torch.no_grad()
def compare_with_transformers(
    checkpoint: str | Path,
    folder: str | Path,
    new_tokens: int = 64,
    seed: int = 0,
    longest: int = 1024,
) -> dict[str, Any]:
    """Compare Megatron's model of a checkpoint with transformers' of an exported folder, float32.

    Args:
        checkpoint: a checkpoint, or a run's folder.
        folder: Hugging Face folder exported from it.
        new_tokens: ids to decode greedily, at most the model's longest sequence - 1.
        seed: of the random prompt and the random sequence that is scored.
        longest: tokens of the sequence that is scored, at most the model's longest.
    Returns:
        max_abs_logit_difference over all positions of a random sequence, largest_logit,
        greedy_tokens, greedy_tokens_equal (length of the common beginning), activation ("none", or
        "int8_per_token", which Megatron's side alone rounds with).
    """
    source = open_megatron(checkpoint)
    stamp, vocab_size = source.stamp, source.vocab_size
    length = min(source.model.max_position_embeddings, longest)
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(vocab_size, (1, length), generator=generator)
    prompt = tokens_BS[0, : max(1, min(8, length - new_tokens))].tolist()
    # Loaded before Megatron's platform is prepared: that changes torch for the whole process.
    reference = load_hf_model(folder, torch.float32)
    theirs = reference(tokens_BS).logits
    # The end token is forbidden on both sides, so that as many tokens as were asked for compare.
    output = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    their_ids = output[0, len(prompt) :].tolist()
    with megatron_model(checkpoint) as model:
        device = next(model.parameters()).device
        follow_length(model, source, length)
        ours = megatron_logits(model, tokens_BS.to(device))[..., :vocab_size].cpu()
        follow_length(model, source, len(prompt) + new_tokens)
        our_ids = decode_greedily(model, prompt, new_tokens, vocab_size, _end_ids(reference))
    equal = [a == b for a, b in zip(our_ids, their_ids, strict=True)]
    return {
        "max_abs_logit_difference": float((ours - theirs).abs().max()),
        "largest_logit": float(ours.abs().max()),
        "greedy_tokens": new_tokens,
        "greedy_tokens_equal": equal.index(False) if False in equal else new_tokens,
        "activation": "none" if stamp is None else stamp.quant.activation,
    }
