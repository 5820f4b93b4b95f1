"""The attention kernel's pieces against explicit masks, and the cut of context parallelism."""

from __future__ import annotations

import math
import resource

import pytest
import torch
from helpers.model_cases import VOCAB
from helpers.model_factory import tiny_model
from helpers.ranks import run_ranks

from megatron_bitcpm.config import ParallelConfig
from megatron_bitcpm.models import attention
from megatron_bitcpm.models.attention import causal_attention
from megatron_bitcpm.models.context_parallel import chunks_of_rank, slice_for_context_parallel
from megatron_bitcpm.models.decoder import Decoder, build_transformer_config
from megatron_bitcpm.training.runtime import start_runtime

pytestmark = pytest.mark.both_versions


def test_zigzag_by_hand():
    x = torch.arange(8).expand(3, 8)
    assert slice_for_context_parallel(x, 0, 2).tolist() == [[0, 1, 6, 7]] * 3
    assert slice_for_context_parallel(x, 1, 2).tolist() == [[2, 3, 4, 5]] * 3
    assert slice_for_context_parallel(x, 3, 4).tolist() == [[3, 4]] * 3
    assert slice_for_context_parallel(x, 0, 1) is x


def by_mask(query, key, value, starts, scale):
    """Softmax over explicit scores; query t sees the keys from starts[t] to t."""
    per_key = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(per_key, 2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
    t = torch.arange(query.shape[0])
    seen = (t[None, None] <= t[None, :, None]) & (t[None, None] >= starts[:, :, None])
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


STARTS = {
    "one document": [[0] * 24, [0] * 24],
    "equal rows": [[0] * 7 + [7] * 10 + [17] * 7] * 2,
    "other rows": [[0] * 6 + [6] * 18, [0] + [1] + [2] * 11 + [13] * 10 + [23]],
}


@pytest.mark.parametrize("mask_elements", [2**23, 30], ids=["one block", "blocks of one query"])
@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("name", [*STARTS, "none"])
def test_chunks_of_every_rank_together_are_the_masked_softmax(
    name, cp_size, mask_elements, monkeypatch
):
    monkeypatch.setattr(attention, "MASK_ELEMENTS", mask_elements)
    starts = None if name == "none" else torch.tensor(STARTS[name])
    query = torch.randn(24, 2, 4, 8, requires_grad=True)
    key, value = (torch.randn(24, 2, 2, 8, requires_grad=True) for _ in range(2))
    out_grad = torch.randn(24, 2, 32)
    expected = by_mask(
        query, key, value, torch.tensor(STARTS["one document"]) if starts is None else starts, 0.4
    )
    expected.backward(out_grad)
    wanted = [x.grad.clone() for x in (query, key, value)]
    for x in (query, key, value):
        x.grad = None
    place = torch.arange(24)[None]
    for rank in range(cp_size):
        own = slice_for_context_parallel(place, rank, cp_size)[0]
        chunks = chunks_of_rank(rank, cp_size)
        first = [number * 24 // (len(chunks) * cp_size) for number in chunks]
        found = causal_attention(query[own], key, value, first, starts, 0.4)
        torch.testing.assert_close(found, expected[own], rtol=1e-5, atol=1e-5)
        found.backward(out_grad[own])
    for x, gradient in zip((query, key, value), wanted, strict=True):
        torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)


LONG = 32768


def peak_of_long_sequence(rank: int, cp_size: int, documents: list[int] | None):
    """MiB by which the peak of this process grows in one forward and backward pass."""
    parallel = ParallelConfig(context_parallel_size=cp_size)
    model = tiny_model(
        "decoder",
        num_layers=1,
        num_attention_heads=2,
        num_query_groups=1,
        max_position_embeddings=LONG,
    )
    with start_runtime(parallel, 0):
        config = build_transformer_config(model, parallel, torch.float32)
        built = Decoder(config, model, VOCAB, LONG)
        whole = torch.arange(LONG)[None]
        starts = None
        if documents:
            lengths = torch.tensor(documents)
            starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)[None]
        own = slice_for_context_parallel(whole, rank, cp_size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        built(own % VOCAB, own, starts, labels=(own + 1) % VOCAB).mean().backward()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (after - before) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("documents", [None, [20000, 300, 68, 12400]], ids=["one", "documents"])
def test_32k_tokens_need_no_matrix_of_that_size_squared(cp_size, documents):
    """One float32 matrix of 32768 x 32768 scores is 4096 MiB, and there are two heads."""
    for peak in run_ranks(cp_size, peak_of_long_sequence, cp_size, documents):
        assert peak < 512
