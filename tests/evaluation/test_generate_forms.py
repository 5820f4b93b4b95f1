"""Text and tokens come out alike from every form of a model's folder."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from helpers.memory_source import MINICPM, make_latent, make_stamp
from helpers.modeling_folders import transformers_log  # noqa: F401

from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.evaluation.generate import generate, load_hf_model, load_hf_tokenizer


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory):
    """A MiniCPM as latents and as its values, with the tokenizer of the tests."""
    root = tmp_path_factory.mktemp("forms")
    source = make_latent(make_stamp(), MINICPM, vocab_size=300, side_files=data / "tok")
    for form in ("latent", "pseudo"):
        write_folder(source, root / form, form)
    return root


def change_code(folders, tmp_path, code):
    """A copy of the latent folder whose modelling file ends with other code."""
    folder = shutil.copytree(folders / "latent", tmp_path / "changed")
    with (folder / "modeling_bitcpm.py").open("a") as file:
        file.write(f"\n{code}\n")
    return folder


def test_text_is_the_same(folders):
    texts = {generate(folders / form, "ab", max_new_tokens=20) for form in ("latent", "pseudo")}
    assert len(texts) == 1
    assert texts != {""}


def test_logits_in_float32_are_those_of_the_stored_values(folders):
    """Quantising latents in float32 would not round the scales as training did."""
    tokens = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent, pseudo = (
            load_hf_model(folders / form, torch.float32)(tokens).logits
            for form in ("latent", "pseudo")
        )
    assert latent.dtype == torch.float32
    assert torch.equal(latent, pseudo)


def test_changed_code_is_not_run(folders, tmp_path):
    folder = change_code(folders, tmp_path, "raise SystemExit('the code was run')")
    with pytest.raises(CheckpointError, match=r"^model=.*modelling code is not the one that"):
        generate(folder, "ab")
    # Only in name: the same file under another entry of config.json.
    folder = shutil.copytree(folders / "latent", tmp_path / "renamed")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other.Model"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        load_hf_model(folder)


def test_code_is_run_when_asked_for(folders, tmp_path, monkeypatch):
    folder = change_code(folders, tmp_path, "import os\nos.environ['RUN_FOR_TEST'] = 'yes'")
    monkeypatch.setenv("RUN_FOR_TEST", "no")
    model = load_hf_model(folder, trust_remote_code=True)
    assert type(model).__name__ == "BitCPMForCausalLM"
    assert os.environ["RUN_FOR_TEST"] == "yes"


def test_loading_the_tokenizer_says_nothing(folders, transformers_log, tmp_path):  # noqa: F811
    """Transformers warns of configurations whose code it was not allowed to run."""
    for form in ("latent", "pseudo"):
        load_hf_tokenizer(folders / form)
    assert transformers_log == []
    folder = change_code(folders, tmp_path, "raise SystemExit('the code was run')")
    load_hf_tokenizer(folder)


def test_a_negative_number_of_tokens_to_sample_among(tmp_path):
    with pytest.raises(BitcpmError, match=r"^top_k=-1: is negative"):
        generate(tmp_path, "a", top_k=-1)
