"""A Llama / MiniCPM decoder written from the published formulas in plain torch, the reference.

It knows nothing of Megatron but the layout of two matrices: fused qkv (for each key head: its query
heads, the key head, the value head) and fc1 (gate above up). Shapes: B batch, S sequence, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """The numbers of a model; names as in the papers."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    theta: float = 10000.0
    eps: float = 1e-6
    scale_emb: float = 1.0
    scale_depth: float | None = None
    dim_model_base: int | None = None
    rope_factors: tuple[float, ...] | None = None  # those of the length at hand
    attention_factor: float = 1.0


Weights = dict[str, torch.Tensor]


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x_BSHD, positions_BS, shape):
    half = shape.head_dim // 2
    factors = torch.tensor(shape.rope_factors or (1.0,) * half, dtype=x_BSHD.dtype)
    frequencies = torch.tensor([shape.theta ** (-i / half) for i in range(half)]).to(x_BSHD.dtype)
    angles = positions_BS[..., None].to(x_BSHD.dtype) * (frequencies / factors)
    cos = shape.attention_factor * angles.cos()[:, :, None]
    sin = shape.attention_factor * angles.sin()[:, :, None]
    first, second = x_BSHD[..., :half], x_BSHD[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def split_qkv(qkv, shape):
    per_group = shape.heads // shape.kv_heads
    rows = qkv.view(shape.kv_heads, per_group + 2, shape.head_dim, -1)
    q, k, v = rows[:, :per_group], rows[:, per_group], rows[:, per_group + 1]
    return (part.reshape(-1, qkv.shape[1]) for part in (q, k, v))


def attention(x, weights: Weights, prefix: str, positions_BS, documents_BS, shape):
    batch, seq, _ = x.shape
    q, k, v = (
        (x @ matrix.T).view(batch, seq, -1, shape.head_dim)
        for matrix in split_qkv(weights[f"{prefix}self_attention.linear_qkv.weight"], shape)
    )
    q, k = rotate(q, positions_BS, shape), rotate(k, positions_BS, shape)
    k, v = (part.repeat_interleave(shape.heads // shape.kv_heads, dim=2) for part in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(shape.head_dim)
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    same = documents_BS[:, :, None] == documents_BS[:, None, :]
    scores = scores.masked_fill(~(causal & same)[:, None], -math.inf)
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, seq, -1)
    return mixed @ weights[f"{prefix}self_attention.linear_proj.weight"].T


def mlp(x, weights: Weights, prefix: str):
    gate, up = weights[f"{prefix}mlp.linear_fc1.weight"].chunk(2)
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    return hidden @ weights[f"{prefix}mlp.linear_fc2.weight"].T


def logits(weights: Weights, tokens_BS, positions_BS, documents_BS, shape: Shape):
    """[B, S, V]; documents_BS numbers the documents, tokens attend within theirs."""
    embedding = weights["embedding.word_embeddings.weight"]
    x = embedding[tokens_BS] * shape.scale_emb
    scale = 1.0 if shape.scale_depth is None else shape.scale_depth / math.sqrt(shape.layers)
    for layer in range(shape.layers):
        prefix = f"decoder.layers.{layer}."
        normed = rms_norm(x, weights[f"{prefix}input_layernorm.weight"], shape.eps)
        x = x + scale * attention(normed, weights, prefix, positions_BS, documents_BS, shape)
        normed = rms_norm(x, weights[f"{prefix}pre_mlp_layernorm.weight"], shape.eps)
        x = x + scale * mlp(normed, weights, prefix)
    x = rms_norm(x, weights["decoder.final_layernorm.weight"], shape.eps)
    if shape.dim_model_base is not None:
        x = x / (x.shape[-1] / shape.dim_model_base)
    return x @ weights.get("output_layer.weight", embedding).T
