"""Megatron's model of a checkpoint and transformers' of its export compute the same."""

from __future__ import annotations

import pytest
import torch
from helpers.memory_source import LLAMA, MINICPM, make_latent, make_stamp
from helpers.ranks import run_ranks
from helpers.trained_checkpoints import SEQ

from megatron_bitcpm.arch.model import RopeScalingConfig
from megatron_bitcpm.errors import CheckpointError


def compare(rank: int, checkpoint: str, folder: str) -> dict:
    from helpers.compare_forwards import compare_with_transformers

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


def run(comparison, checkpoint, folder):
    """What a comparison finds in a process of its own."""
    return run_ranks(1, comparison, str(checkpoint.directory), str(folder), timeout_s=280)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["tp1_untied", "tp2_tied_fp32", "tp2_groups_filters", "full_precision"]
)
def test_logits_and_greedy_tokens(case, trained, exported):
    report = run(compare, trained(case), exported(case))
    print(case, report)
    # Both compute in float32 but order their sums differently.
    assert report["max_abs_logit_difference"] <= 1e-4
    assert report["largest_logit"] > 0.1
    assert report["greedy_tokens_equal"] == 64
    assert report["activation"] == "none"


@pytest.mark.slow
def test_activations_are_rounded_as_in_training(trained, exported):
    found = run(compare_rounded, trained("tp2_tensor"), exported("tp2_tensor"))
    print(found)
    assert found["sliced"] * 5 < min(found["whole"], found["without"])


@pytest.mark.slow
def test_the_report_names_the_activation(trained, exported):
    report = run(compare, trained("tp2_tensor"), exported("tp2_tensor"))
    assert report["activation"] == "int8_per_token"
    # The folder rounds nothing; that shows, and changes little.
    assert 1e-4 < report["max_abs_logit_difference"] < 0.05 * report["largest_logit"]


# -- models that were never trained: every architecture, grid and form ---------------------------

LONGROPE = RopeScalingConfig(
    short_factor=tuple(1 + 0.1 * i for i in range(12)),
    long_factor=tuple(2 + 0.3 * i for i in range(12)),
    original_max_position_embeddings=32,
)
CASES = {
    "llama_latent": ("llama", {}, "latent", False),
    "minicpm_latent": ("minicpm", {"group_size": 16}, "latent", False),
    "minicpm_pseudo": ("minicpm", {"grid": "five"}, "pseudo", False),
    "minicpm_folded": ("minicpm", {}, "pseudo", True),
    "llama_half_sym4": ("llama", {"grid": "half_sym4", "group_size": "tensor"}, "pseudo", False),
    "llama_asym4": ("llama", {"grid": "asym4"}, "pseudo", False),
    "llama_int_sym4": ("llama", {"grid": "int_sym4"}, "latent", False),
    "minicpm_plain": ("minicpm", None, "plain", False),
}


def write_and_compare(rank: int, data: str, folder: str, names: list[str]) -> dict[str, dict]:
    """Write each case as a Megatron checkpoint and as a folder, from memory; compare logits."""
    from pathlib import Path

    from megatron_bitcpm.arch.layout import Layout
    from megatron_bitcpm.conversion.hf.fold import fold
    from megatron_bitcpm.conversion.hf.writer import write_folder
    from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
    from megatron_bitcpm.evaluation.generate import load_hf_model
    from megatron_bitcpm.evaluation.logits import (
        follow_length,
        megatron_logits,
        megatron_model,
        open_megatron,
    )

    tokens_BS = torch.randint(300, (1, 60), generator=torch.Generator().manual_seed(0))
    theirs, found = {}, {}
    for name in names:
        architecture, quant, form, is_folded = CASES[name]
        model = {"llama": LLAMA, "minicpm": MINICPM}[architecture]
        model = model.model_copy(update={"rope_scaling": LONGROPE})
        stamp = None if quant is None else make_stamp(tp_size=2, **quant)
        source = make_latent(stamp, model, vocab_size=300, side_files=Path(data) / "tok")
        layout = Layout(2, 1)
        write_torch_dist(source, Path(folder) / name / "megatron", layout)
        source = fold(source) if is_folded else source
        write_folder(source, Path(folder) / name / "hf", form)
        hf = load_hf_model(Path(folder) / name / "hf", torch.float32)
        theirs[name] = {length: hf(tokens_BS[:, :length]).logits for length in (20, 60)}
        # What a wrong split of a fused weight would make of it.
        mlp = hf.model.layers[1].mlp
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
        theirs[name]["swapped"] = hf(tokens_BS).logits
    for name in names:
        checkpoint = open_megatron(Path(folder) / name / "megatron")
        with megatron_model(checkpoint) as model:
            for length, logits in theirs[name].items():
                # Below and above the original length: LongRoPE's two arrays.
                tokens = tokens_BS[:, : logits.shape[1]]
                follow_length(model, checkpoint, tokens.shape[1])
                ours = megatron_logits(model, tokens)[..., :300]
                found[f"{name} {length}"] = {
                    "difference": float((ours - logits).abs().max()),
                    "largest": float(logits.abs().max()),
                }
    return found


def check_cases(names, data, tmp_path):
    (found,) = run_ranks(1, write_and_compare, str(data), str(tmp_path), names, timeout_s=280)
    for name, result in found.items():
        print(name, result)
        # Both sum in float32; folded weights are rounded to bfloat16 a second time.
        limit = 0.005 if "folded" in name else 1e-5
        assert result["largest"] > 0.01, (name, result)
        if name.endswith("swapped"):
            assert result["difference"] > 5 * limit * result["largest"], (name, result)
        else:
            assert result["difference"] <= limit * result["largest"], (name, result)
    assert len(found) == 3 * len(names)


@pytest.mark.slow
def test_minicpm_with_longrope(data, tmp_path):
    check_cases(["minicpm_latent", "minicpm_folded"], data, tmp_path)


@pytest.mark.both_versions
@pytest.mark.slow
def test_all_architectures_grids_and_forms(data, tmp_path):
    check_cases(list(CASES), data, tmp_path)


def test_a_folder_is_no_megatron_checkpoint(exported):
    from megatron_bitcpm.evaluation.logits import open_megatron

    with pytest.raises(CheckpointError, match="is not a Megatron checkpoint"):
        open_megatron(exported("tp1_untied"))
