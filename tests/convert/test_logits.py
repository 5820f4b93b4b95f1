"""Megatron's model of a checkpoint and transformers' of its export compute the same."""

from __future__ import annotations

import pytest
from helpers.ranks import run_ranks


def compare(rank: int, checkpoint: str, folder: str) -> dict:
    from megatron_bitcpm.evaluation.logits import compare_with_transformers

    return compare_with_transformers(checkpoint, folder, new_tokens=64)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("tp1_untied", marks=pytest.mark.slow),
        pytest.param("tp2_tied_fp32", marks=pytest.mark.slow),
        pytest.param("tp2_groups_filters", marks=pytest.mark.slow),
        pytest.param("full_precision", marks=pytest.mark.slow),
    ],
)
def test_logits_and_greedy_tokens(case, trained, exported):
    (report,) = run_ranks(
        1, compare, str(trained(case).directory), str(exported(case)), timeout_s=280
    )
    print(case, report)
    # Both compute in float32 but order their sums differently.
    assert report["max_abs_logit_difference"] <= 1e-4
    assert report["largest_logit"] > 0.1
    assert report["greedy_tokens_equal"] == 64
