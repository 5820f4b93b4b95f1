"""Megatron's forward of a checkpoint beside transformers' of a folder made from it."""

from __future__ import annotations

from typing import Any

import torch

from megatron_bitcpm.evaluation.generate import load_hf_model
from megatron_bitcpm.evaluation.logits import (
    follow_length,
    megatron_logits,
    megatron_model,
    open_megatron,
)


def _decode_greedily(
    model: torch.nn.Module,
    prompt: list[int],
    new_tokens: int,
    vocab_size: int,
    forbidden: list[int],
) -> list[int]:
    """Return the most likely continuation, token by token, each from the whole sequence."""
    ids = list(prompt)
    device = next(model.parameters()).device
    for _ in range(new_tokens):
        logits = megatron_logits(model, torch.tensor([ids], device=device))
        scores_V = logits[0, -1, :vocab_size].clone()
        scores_V[forbidden] = -torch.inf
        ids.append(int(scores_V.argmax()))
    return ids[len(prompt) :]


def _end_ids(model: Any) -> list[int]:
    """Return the end tokens of a model of transformers, at which its generation stops."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


@torch.no_grad()
def compare_with_transformers(checkpoint: str, folder: str, new_tokens: int) -> dict[str, Any]:
    """Compare logits of a random sequence, and greedy tokens, both in float32.

    greedy_tokens_equal is the length of the common beginning; an activation of "int8_per_token" is
    one that Megatron's side alone rounds with.
    """
    source = open_megatron(checkpoint)
    stamp, vocab_size = source.quantizer, source.vocab_size
    length = min(source.model.max_position_embeddings, 1024)
    generator = torch.Generator().manual_seed(0)
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
        our_ids = _decode_greedily(model, prompt, new_tokens, vocab_size, _end_ids(reference))
    equal = [a == b for a, b in zip(our_ids, their_ids, strict=True)]
    return {
        "max_abs_logit_difference": float((ours - theirs).abs().max()),
        "largest_logit": float(ours.abs().max()),
        "greedy_tokens_equal": equal.index(False) if False in equal else new_tokens,
        "activation": "none" if stamp is None else stamp.config.activation,
    }
