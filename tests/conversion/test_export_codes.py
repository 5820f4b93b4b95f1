"""What is exported is what the training forward multiplied with, bit for bit."""

from __future__ import annotations

import fnmatch
import json

import pytest
import torch
from helpers.trained_checkpoints import CASES, FC2, LAYERS, PROJ, gather_layer, read_tensor
from safetensors.torch import load_file

from megatron_bitcpm.conversion.verify import verify

SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("tp2_bf16", "tp2_local")]
SLOW += [pytest.param("tp2_groups_filters", marks=pytest.mark.slow)]
TERNARY = ["tp1_untied", "tp2_tied_fp32", "tp2_tensor", *SLOW]


def load_all(folder) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


@pytest.mark.parametrize("case", TERNARY)
def test_exported_tensors_are_those_of_the_forward(case, trained, exported):
    run, tensors = trained(case), load_all(exported(case))
    compared = 0
    for layer in range(LAYERS):
        for name, forward in gather_layer(run.forward, layer).items():
            stored = tensors[f"model.layers.{layer}.{name}.weight"]
            assert forward.count_nonzero() > 0
            assert torch.equal(stored.float(), forward), name
            compared += 1
    listed = json.loads((exported(case) / "bitcpm_quantizer.json").read_text())["ternary_tensors"]
    assert len(listed) == compared


@pytest.mark.parametrize("case", TERNARY)
def test_verify_against_the_checkpoint(case, trained, exported):
    report = verify(exported(case), trained(case).directory)
    assert report["differing_codes"] == report["differing_scales"] == 0
    assert report["differing_values"] == 0
    assert report["iteration"] == 4
    assert report["checkpoint"].startswith(str(trained(case).directory))
    assert report["activation"] == CASES[case]["quant"].get("activation", "none")
    tied = CASES[case].get("model", {}).get("share_embeddings_and_output_weights", False)
    assert report["compared_tensors"] == 9 * LAYERS + (2 if tied else 3)
    assert 1 < report["entropy_bits_per_weight"] < 1.585
    counted = [t for n, t in load_all(exported(case)).items() if n in groups_of(exported(case))]
    zeros = sum(int((t == 0).sum()) for t in counted) / sum(t.numel() for t in counted)
    assert report["zero_fraction"] == pytest.approx(zeros, abs=1e-12)


def groups_of(folder) -> dict[str, int]:
    return json.loads((folder / "bitcpm_quantizer.json").read_text())["ternary_tensors"]


@pytest.mark.parametrize(
    ("case", "o_proj", "down_proj"),
    [
        ("tp2_tied_fp32", 128, 160),
        pytest.param("tp2_local", 64, 80, marks=pytest.mark.slow),
    ],
)
def test_group_sizes_of_sharded_rows(case, o_proj, down_proj, exported):
    groups = groups_of(exported(case))
    assert groups["model.layers.0.self_attn.o_proj.weight"] == o_proj
    assert groups["model.layers.0.mlp.down_proj.weight"] == down_proj
    assert groups["model.layers.0.mlp.up_proj.weight"] == 48


def test_one_scale_per_projection(exported):
    folder, tensors = exported("tp2_tensor"), load_all(exported("tp2_tensor"))
    scales = set()
    for name, group_size in groups_of(folder).items():
        assert group_size == tensors[name].numel()
        magnitudes = set(tensors[name].abs().unique().tolist()) - {0.0}
        assert len(magnitudes) == 1, name
        scales |= magnitudes
    # In bfloat16 two may agree by chance.
    assert len(scales) > 5 * LAYERS
    card = (folder / "README.md").read_text()
    assert "where s is the scale of the whole matrix." in card.replace("\n", " ")
    assert "rounded to 8 bits in front of these matrices" in card.replace("\n", " ")
    # The loss is not that of the folder, which rounds nothing.
    assert "\n| validation loss (with 8-bit activations, as trained) | " in card
    plain = (exported("tp1_untied") / "README.md").read_text()
    assert "\n| validation loss | " in plain


@pytest.mark.slow
def test_filters_leave_latents_in_place(trained, exported):
    case = "tp2_groups_filters"
    groups, tensors = groups_of(exported(case)), load_all(exported(case))
    quant = CASES[case]["quant"]
    assert not any(name.startswith("model.layers.0.") for name in groups)
    for layer in range(LAYERS):
        for site, hf_name in ((PROJ, "self_attn.o_proj"), (FC2, "mlp.down_proj")):
            name = f"decoder.layers.{layer}.{site}"
            excluded = layer < 1 or any(fnmatch.fnmatch(name, p) for p in quant["exclude"])
            key = f"model.layers.{layer}.{hf_name}.weight"
            assert (key not in groups) == excluded
            latent = read_tensor(trained(case).directory, f"{name}.weight")
            assert torch.equal(tensors[key], latent) == excluded


def test_padding_rows_are_left_out(trained, exported):
    tensors = load_all(exported("tp1_untied"))
    for name, hf_name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        full = read_tensor(trained("tp1_untied").directory, name)
        assert full.shape[0] == 320
        assert tensors[hf_name].shape[0] == 300
        assert torch.equal(tensors[hf_name], full[:300])
    assert "lm_head.weight" not in load_all(exported("tp2_tied_fp32"))
