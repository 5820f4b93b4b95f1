"""The FLOP formula against torch's own counter on a built model; memory of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.model_factory import tiny_model
from helpers.ranks import run_ranks
from helpers.tiny_models import SEQ, VOCAB, tiny_run
from torch.utils.flop_counter import FlopCounterMode

from megatron_bitcpm.arch.counts import tflops_per_device, training_flops_per_token
from megatron_bitcpm.training.memory import measure_peak_memory_gb

pytestmark = pytest.mark.both_versions


def counted_flops(rank: int, model, changes: dict) -> tuple[int, int]:
    """FLOPs of one forward and backward as torch sees them, and tokens in it."""
    with tiny_run(None, model=model, dtype=torch.float32, micro_batches=1, **changes) as run:
        with FlopCounterMode(display=False) as counter:
            run.forward_backward(0)
        return counter.get_total_flops(), 2 * SEQ


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"num_query_groups": 4, "num_layers": 3}, marks=pytest.mark.slow),
        pytest.param(
            {"num_query_groups": 1, "kv_channels": 24, "ffn_hidden_size": 136},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gqa", "mha", "wide-heads"],
)
def test_formula_equals_the_count_of_torch(changes):
    model = tiny_model(**changes)
    megatron = {"kv_channels": model.head_dim}
    counted, tokens = run_ranks(1, counted_flops, model, megatron)[0]
    # The counter sees the whole square of scores, twice (scores, values), forward and backward.
    other_half = 3 * model.num_layers * 2 * model.num_attention_heads * model.head_dim * SEQ
    assert counted == tokens * (training_flops_per_token(model, VOCAB, SEQ) + other_half)


def test_formula_on_numbers_worked_by_hand():
    model = tiny_model(
        num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1
    )
    # qkv 8x(8+4+4), proj 8x8, gate/up/down 3x8x16: 576 weights; output 8x32; scores 2x8x10/2 x2.
    assert training_flops_per_token(model, 32, 10) == 3 * (2 * 576 + 2 * 256 + 160)


def test_tflops_per_device():
    assert tflops_per_device(2e9, 1000, 4) == 0.5


def hold_memory(rank: int) -> tuple[float, float, float]:
    before = measure_peak_memory_gb(torch.device("cpu"))
    held = np.ones(200_000_000 // 8) if rank == 1 else None
    during = measure_peak_memory_gb(torch.device("cpu"))
    del held
    return before, during, measure_peak_memory_gb(torch.device("cpu"))


def test_memory_is_the_peak_of_the_fullest_rank():
    ranks = run_ranks(2, hold_memory)
    assert ranks[0] == ranks[1]
    before, during, after = ranks[0]
    assert during - before == pytest.approx(0.2, rel=0.1)
    # Linux updates the peak late, by some pages.
    assert after >= during - 0.001
