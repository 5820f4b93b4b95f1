"""Megatron's model of a checkpoint and transformers' of its export compute the same."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks
from trained_checkpoints import SEQ


def compare(rank: int, checkpoint: str, folder: str) -> dict:
    from megatron_bitcpm.evaluation.logits import compare_with_transformers

    return compare_with_transformers(checkpoint, folder, new_tokens=64)


def round_token(x: torch.Tensor) -> torch.Tensor:
    """The rounding of transformers' AutoBitLinear (float32)."""
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round().clamp(-128, 127) / scale


def compare_rounded(rank: int, checkpoint: str, folder: str) -> dict[str, float]:
    """Mean differences from transformers' model, with such a rounding in front and without it."""
    from megatron_bitcpm.evaluation.generate import load_hf_model
    from megatron_bitcpm.evaluation.logits import megatron_logits, megatron_model

    tokens_BS = torch.randint(300, (1, SEQ), generator=torch.Generator().manual_seed(0))
    reference = load_hf_model(folder, torch.float32)
    theirs = {"without": reference(tokens_BS).logits}

    def round_input(slices):
        def hook(module, inputs):
            return torch.cat([round_token(part) for part in inputs[0].chunk(slices, -1)], -1)

        return hook

    # The attention output and down were trained in two slices, whose tokens have two scales.
    rows = [m for n, m in reference.named_modules() if n.endswith(("o_proj", "down_proj"))]
    rest = [m for n, m in reference.named_modules() if n.endswith("_proj") and m not in rows]
    for name, slices in (("whole", 1), ("sliced", 2)):
        hooks = [m.register_forward_pre_hook(round_input(1)) for m in rest]
        hooks += [m.register_forward_pre_hook(round_input(slices)) for m in rows]
        theirs[name] = reference(tokens_BS).logits
        for hook in hooks:
            hook.remove()
    with megatron_model(checkpoint) as model:
        device = next(model.parameters()).device
        ours = megatron_logits(model, tokens_BS.to(device))[..., :300].cpu()
    return {name: float((ours - logits).abs().mean()) for name, logits in theirs.items()}


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
    assert report["activation"] == "none"


def test_activations_are_rounded_as_in_training(trained, exported):
    case = "tp2_tensor"
    arguments = (str(trained(case).directory), str(exported(case)))
    (found,) = run_ranks(1, compare_rounded, *arguments, timeout_s=280)
    print(found)
    assert found["sliced"] * 5 < min(found["whole"], found["without"])


@pytest.mark.slow
def test_the_report_names_the_activation(trained, exported):
    case = "tp2_tensor"
    arguments = (str(trained(case).directory), str(exported(case)))
    (report,) = run_ranks(1, compare, *arguments, timeout_s=280)
    assert report["activation"] == "int8_per_token"
    # The folder rounds nothing; that shows, and changes little.
    assert 1e-4 < report["max_abs_logit_difference"] < 0.05 * report["largest_logit"]
