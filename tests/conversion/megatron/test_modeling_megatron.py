"""A latent folder of a trained checkpoint has the forward pass of Megatron."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.modeling_folders import (  # noqa: F401
    load,
    modules_cache,
    transformers_log,
    weights_of_forward,
)
from helpers.trained_checkpoints import LAYERS, gather_layer

from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.evaluation.generate import generate
from megatron_bitcpm.evaluation.logits import megatron_logits, megatron_model

SLOW = ("tp2_bf16", "tp2_local", "tp2_groups_filters", "tp2_tied_fp32")
CASES = [
    pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW))
    for n in ("tp1_untied", "tp2_tensor", *SLOW)
]
IDS = torch.randint(300, (1, 80), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def latent(trained, tmp_path_factory):
    """Function: name of a case -> its latent folder."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp("latent") / name
            write_folder(open_source(trained(name).directory), done[name], "latent")
        return done[name]

    return get


class FixedValues:
    """In place of a quantiser: the weight holds the values already."""

    def __init__(self, slices):
        self.slices = slices

    def __call__(self, w):
        return w


def use_values_in_float32(model):
    """Keep the values of the forward in the type of the latents, and compute in float32."""
    linears = [m for m in model.modules() if type(m).__name__ == "LinearQuantizer"]
    values = [linear.quantized_weight().detach() for linear in linears]
    model.float()
    for linear, wq in zip(linears, values, strict=True):
        linear.weight.data, linear.quantizer = wq.float(), FixedValues(linear.quantizer.slices)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_folder_multiplies_with_what_training_multiplied_with(
    name, trained, latent, monkeypatch
):
    used = weights_of_forward(load(latent(name)), IDS, monkeypatch)
    compared = 0
    for layer in range(LAYERS):
        for projection, matrix in gather_layer(trained(name).forward, layer).items():
            assert torch.equal(used[f"model.layers.{layer}.{projection}.weight"].float(), matrix)
            compared += 1
    block = json.loads((latent(name) / "config.json").read_text())["bitcpm_quantizer"]
    assert compared == 7 * LAYERS - len(block["full_precision"]) > 0


@pytest.mark.both_transformers
def test_the_tokenizer_and_generate_work_on_the_folder(latent, transformers_log):  # noqa: F811
    from transformers import AutoTokenizer

    folder = latent("tp1_untied")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("abc def", return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True).strip() == "abc def"
    output = load(folder).generate(**ids, max_new_tokens=4, do_sample=False)
    assert output.shape[1] == ids["input_ids"].shape[1] + 4 and transformers_log == []
    assert isinstance(generate(folder, "abc", max_new_tokens=4), str)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_megatrons(name, trained, latent):
    # Loaded before Megatron's platform is prepared: that changes torch for the whole process.
    model = use_values_in_float32(load(latent(name)))
    with torch.no_grad():
        theirs = model(IDS).logits
    with megatron_model(trained(name).directory) as ours:
        wanted = megatron_logits(ours, IDS)[..., :300]
    # Another order of sums, and cos and sin from other routines.
    assert (theirs - wanted).abs().max() < 2e-4 * wanted.abs().max()
    assert torch.equal(theirs.argmax(-1), wanted.argmax(-1))
