"""Causal attention within documents, over a whole or a context-parallel sequence.

A query at token t attends to the keys in [document_start[t], t]. No matrix of the size of the
sequence squared is ever held: queries and keys are cut at the documents, pieces where both begin at
the same token use the causal kernel of `scaled_dot_product_attention`, and pieces whose keys begin
before the queries (context parallelism only) go block by block with a small mask.

Shape suffixes: S sequence of this rank, B batch, H heads, D channels of a head.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention

from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.models.context_parallel import chunks_of_rank, gather_for_context_parallel

# Of the largest mask; the kernels hold it in the type of the queries.
MASK_ELEMENTS = 2**23


class CausalAttention(MegatronModule):
    """Takes the place of Megatron's DotProductAttention: same constructor, same call.

    Under context parallelism every rank gathers the keys and values of the whole sequence; with the
    few key heads of grouped queries that is a small message.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self", layer_number
        assert not (attention_dropout or config.attention_dropout), "no dropout in pretraining"
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5
        # Releases before 0.13 do not hand over groups.
        groups = pg_collection is not None
        self.cp_group = pg_collection.cp if groups else parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend as `causal_attention`; `attention_mask` is `document_start`, not sliced."""
        assert attention_bias is None and packed_seq_params is None
        cp_size = self.cp_group.size()
        if cp_size > 1:
            both = gather_for_context_parallel(torch.stack((key, value), 1), self.cp_group)
            key, value = both.unbind(1)
        _check_document_start(attention_mask, key)
        chunks = chunks_of_rank(self.cp_group.rank(), cp_size)
        length = query.shape[0] // len(chunks)
        first_tokens = [number * length for number in chunks]
        return causal_attention(query, key, value, first_tokens, attention_mask, self.softmax_scale)


def _check_document_start(mask: torch.Tensor | None, key: torch.Tensor) -> None:
    wanted = (key.shape[1], key.shape[0])
    if mask is None or (mask.dtype == torch.int64 and tuple(mask.shape) == wanted):
        return
    raise ModelError(
        f"attention_mask={str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}: must be "
        f"int64 {list(wanted)}, the first token of each token's document, or None. Use "
        "`document_start` of the batch, without context-parallel slicing."
    )


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first_tokens: list[int],
    document_start: torch.Tensor | None,
    softmax_scale: float,
) -> torch.Tensor:
    """Attend from some chunks of a sequence to all of it, within documents; [S, B, H * D].

    `query`, [S, B, H, D], holds equally long chunks of the sequence, one after the other, which
    begin at `first_tokens`; key and value are [whole sequence, B, key heads, D]. `document_start`,
    int64 [B, whole sequence], has the place of the first token of each token's document; None where
    each sequence is one document. On the host it spares a synchronisation: work is planned there.
    """
    length = query.shape[0] // len(first_tokens)
    plans = _plan(first_tokens, length, document_start)
    # Sequences that are cut at the same places go together.
    together = len(set(plans)) == 1
    rows = query.shape[1] if together else 1
    outputs = []
    inputs = (x.permute(1, 2, 0, 3).split(rows) for x in (query, key, value))
    for plan, q_BHSD, k_BHSD, v_BHSD in zip(plans, *inputs, strict=False):
        parts = [
            _attend_chunk(chunk, k_BHSD, v_BHSD, key_start, bounds, softmax_scale)
            for chunk, (key_start, bounds) in zip(q_BHSD.split(length, 2), plan, strict=True)
        ]
        outputs.append(torch.cat(parts, 2))
    return torch.cat(outputs).permute(2, 0, 1, 3).flatten(2)


Plan = tuple[tuple[int, tuple[int, ...]], ...]


def _plan(first_tokens: list[int], length: int, document_start: torch.Tensor | None) -> list[Plan]:
    """For each sequence and chunk: the first key, and where pieces begin and the chunk ends."""
    if document_start is None:
        return [tuple((0, (first, first + length)) for first in first_tokens)]
    starts_BS = document_start.cpu()
    begins_BS = starts_BS == torch.arange(starts_BS.shape[1])
    plans: list[Plan] = []
    for starts_S, begins_S in zip(starts_BS, begins_BS, strict=True):
        chunks = []
        for first in first_tokens:
            inside = begins_S[first + 1 : first + length].nonzero().flatten() + first + 1
            chunks.append((int(starts_S[first]), (first, *inside.tolist(), first + length)))
        plans.append(tuple(chunks))
    return plans


def _attend_chunk(
    q_BHSD: torch.Tensor,
    k_BHSD: torch.Tensor,
    v_BHSD: torch.Tensor,
    key_start: int,
    bounds: tuple[int, ...],
    scale: float,
) -> torch.Tensor:
    """Attend from one chunk; its first piece may continue a document, all others begin one."""
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    key_lengths = [lengths[0] + bounds[0] - key_start, *lengths[1:]]
    # split, because the gradient of many slices would be as many tensors of the whole length.
    pieces = zip(
        q_BHSD.split(lengths, 2),
        k_BHSD[:, :, key_start : bounds[-1]].split(key_lengths, 2),
        v_BHSD[:, :, key_start : bounds[-1]].split(key_lengths, 2),
        strict=True,
    )
    outputs = [
        _sdpa(q, k, v, scale, is_causal=True)
        if q.shape[2] == k.shape[2]
        else _LastQueries.apply(q, k, v, scale)
        for q, k, v in pieces
    ]
    return torch.cat(outputs, 2)


def _sdpa(
    q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, scale: float, **mask: Any
) -> torch.Tensor:
    grouped = q_BHSD.shape[1] != k_BHSD.shape[1]
    return scaled_dot_product_attention(
        q_BHSD, k_BHSD, v_BHSD, scale=scale, enable_gqa=grouped, **mask
    )


class _LastQueries(torch.autograd.Function):
    """Causal attention of the last queries of a document to all its keys.

    Block by block with the mask of the block. The kernels would keep every mask for the backward
    pass, together as large as the scores, so that pass computes each block again.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(q_BHSD, k_BHSD, v_BHSD)
        ctx.scale = scale
        outputs = [
            _attend_block(q_BHSD[:, :, begin:end], k_BHSD[:, :, :keys], v_BHSD[:, :, :keys], scale)
            for begin, end, keys in _blocks(q_BHSD, k_BHSD)
        ]
        return torch.cat(outputs, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BHSD, k_BHSD, v_BHSD = ctx.saved_tensors
        dq = torch.empty_like(q_BHSD)
        # Each key collects from all blocks.
        dk = torch.zeros_like(k_BHSD, dtype=torch.float32)
        dv = torch.zeros_like(v_BHSD, dtype=torch.float32)
        for begin, end, keys in _blocks(q_BHSD, k_BHSD):
            views = q_BHSD[:, :, begin:end], k_BHSD[:, :, :keys], v_BHSD[:, :, :keys]
            q, k, v = (view.detach().requires_grad_() for view in views)
            with torch.enable_grad():
                output = _attend_block(q, k, v, ctx.scale)
            gradients = torch.autograd.grad(output, (q, k, v), grad[:, :, begin:end])
            dq[:, :, begin:end] = gradients[0]
            dk[:, :, :keys] += gradients[1]
            dv[:, :, :keys] += gradients[2]
        return dq, dk.to(k_BHSD.dtype), dv.to(v_BHSD.dtype), None


def _blocks(q_BHSD: torch.Tensor, k_BHSD: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return (first query, end of queries, number of keys) of each block."""
    queries, keys = q_BHSD.shape[2], k_BHSD.shape[2]
    size = max(1, MASK_ELEMENTS // keys)
    bounds = itertools.pairwise([*range(0, queries, size), queries])
    return [(begin, end, keys - queries + end) for begin, end in bounds]


def _attend_block(
    q_BHSD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, scale: float
) -> torch.Tensor:
    queries, keys = q_BHSD.shape[2], k_BHSD.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BHSD.device).tril(keys - queries)
    return _sdpa(q_BHSD, k_BHSD, v_BHSD, scale, attn_mask=mask)
