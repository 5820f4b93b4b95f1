"""The folder as a whole: loads in transformers, is complete or absent, refuses bad input."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from helpers.model_factory import MUP
from helpers.numpy_ternary import fake_quantize
from helpers.trained_checkpoints import SEQ, open_tensors, read_tensor
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_bitcpm.conversion.convert import convert
from megatron_bitcpm.conversion.verify import verify
from megatron_bitcpm.data.tokenizer import load_tokenizer
from megatron_bitcpm.errors import BitcpmError, CheckpointError
from megatron_bitcpm.evaluation.generate import generate, load_hf_model, load_hf_tokenizer

CASE = "tp1_untied"


def test_config_is_a_plain_llama(exported):
    config = json.loads((exported(CASE) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_scaling"] is None
    assert config["rope_theta"] == 5000.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["head_dim"] == 32
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    assert config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is False
    with safe_open(exported(CASE) / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_transformers_loads_it(exported, trained):
    model = load_hf_model(exported(CASE))
    assert model.dtype is torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert not model.generation_config.do_sample
    tokenizer, ours = load_hf_tokenizer(exported(CASE)), load_tokenizer(trained(CASE).tokenizer)
    assert tokenizer.encode("abc def  g", add_special_tokens=False) == ours.encode("abc def  g")
    assert load_tokenizer(exported(CASE)).sha256 == ours.sha256


@pytest.mark.slow
def test_generate(exported):
    folder = exported(CASE)
    greedy = generate(folder, "abc", max_new_tokens=8)
    assert greedy == generate(folder, "abc", max_new_tokens=8, seed=5)
    sampled = generate(folder, "", max_new_tokens=8, temperature=1.0, seed=1)
    assert sampled == generate(folder, "", max_new_tokens=8, temperature=1.0, seed=1)
    generate(folder, "a " * 30, max_new_tokens=10 * SEQ)
    with pytest.raises(BitcpmError, match=r"prompt=.*leaves no room"):
        generate(folder, "a " * 10 * SEQ)
    with pytest.raises(BitcpmError, match="temperature=-1"):
        generate(folder, "a", temperature=-1)
    with pytest.raises(CheckpointError, match="no such folder"):
        generate(folder / "absent", "a")


def test_record_of_the_quantizer(exported):
    record = json.loads((exported("tp2_tied_fp32") / "bitcpm_quantizer.json").read_text())
    assert record["quantizer"]["tensor_model_parallel_size"] == 2
    assert record["quantizer"]["numerics"] == "fp32"
    assert record["source"]["iteration"] == 4
    assert record["source"]["tokens"] == 4 * 4 * SEQ
    card = (exported("tp2_tied_fp32") / "README.md").read_text()
    assert "one of -s, 0, s" in card
    assert "| optimizer steps | 4 |" in card
    assert "nats per token" in card


def test_shards(trained, tmp_path, exported):
    report = convert(trained(CASE).directory, tmp_path / "out", max_shard_size=40_000)
    assert report["verify"]["activation"] == "none"
    assert len(report["files"]) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report["bytes"]
    assert set(index["weight_map"].values()) == set(report["files"])
    whole = load_hf_model(exported(CASE)).state_dict()
    for name, tensor in load_hf_model(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, whole[name])
    (tmp_path / "out" / report["files"][1]).unlink()
    with pytest.raises(CheckpointError, match=f"{report['files'][1]} is missing"):
        verify(tmp_path / "out")


@pytest.mark.slow
def test_full_precision_is_an_ordinary_folder(trained, exported, tmp_path):
    folder, run = exported("full_precision"), trained("full_precision")
    assert not (folder / "bitcpm_quantizer.json").exists()
    assert "ternary" not in (folder / "README.md").read_text().lower()
    latent = read_tensor(run.directory, "decoder.layers.0.mlp.linear_fc2.weight")
    stored = load_hf_model(folder).state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(stored, latent)
    report = verify(folder, run.directory)
    assert report["form"] == "plain" and report["ternary_tensors"] == 0
    assert report["compared_tensors"] > 0 and report["differing_values"] == 0


# -- complete or absent ---------------------------------------------------------------------------


def test_output_is_not_replaced_unless_asked(trained, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"output=.*out: exists"):
        convert(trained(CASE).directory, output)
    with pytest.raises(CheckpointError, match="is not a converted model, so it is not replaced"):
        convert(trained(CASE).directory, output, overwrite=True)
    assert (output / "mine.txt").read_text() == "x"
    shutil.rmtree(output)
    convert(trained(CASE).directory, output)
    (output / "README.md").write_text("x")
    convert(trained(CASE).directory, output, overwrite=True)
    assert (output / "README.md").read_text() != "x"
    verify(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_tokenizers(trained, changed, tmp_path):
    directory = trained(CASE).directory
    for folder, message in (
        (tmp_path / "absent", "tokenizer=.*absent: no such folder"),
        (tmp_path, "holds no vocabulary"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(directory, tmp_path / "out", tokenizer=folder)
    other = shutil.copytree(trained(CASE).tokenizer, tmp_path / "tok")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 300
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its files hold 301 ids, the model has 300"):
        convert(directory, tmp_path / "out", tokenizer=other)
    gone = changed(data={"tokenizer": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match=r"tokenizer=None: .* not where its training had it"):
        convert(gone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def changed(trained, tmp_path):
    """Function: a copy of the checkpoint with another quantiser or architecture in its files."""

    def get(quant=(), model=(), data=()):
        source = open_tensors(trained(CASE).directory).folder
        copy = shutil.copytree(source, tmp_path / source.name)
        state = json.loads((copy / "bitcpm_state.json").read_text())
        state["quantizer"] |= dict(quant)
        (copy / "bitcpm_state.json").write_text(json.dumps(state))
        config = yaml.safe_load((copy / "bitcpm_config.yaml").read_text())
        config["model"] |= dict(model)
        config["data"] |= dict(data)
        (copy / "bitcpm_config.yaml").write_text(yaml.safe_dump(config))
        return copy

    return get


def test_bad_checkpoints(changed, tmp_path):
    with pytest.raises(CheckpointError, match="holds neither a Hugging Face model nor a Megatron"):
        convert(tmp_path, tmp_path.parent / "out")
    with pytest.raises(CheckpointError, match=r"fc1\.weight is \[320, 48\], not \[160, 48\]"):
        convert(changed(model={"ffn_hidden_size": 80}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "quant",
    [
        {"grid": "asym4"},
        {"grid": "half_sym4", "group_size": 16},
        {"grid": "int_sym4"},
        {"grid": "five", "group_size": 16},
        {"numerics": "bf16_reciprocal"},
    ],
    ids=lambda quant: "-".join(map(str, quant.values())),
)
def test_other_grids_and_numerics(quant, changed, tmp_path):
    checkpoint = changed(quant)
    report = convert(checkpoint, tmp_path / "out")
    verified = report["verify"]
    assert verified["differing_codes"] == verified["differing_scales"] == 0
    latent = read_tensor(checkpoint, "decoder.layers.2.mlp.linear_fc2.weight")
    stored = load_file(tmp_path / "out" / "model.safetensors")[
        "model.layers.2.mlp.down_proj.weight"
    ]
    group_size = quant.get("group_size", -1)
    if "numerics" in quant:
        mean = latent.float().abs().mean(-1, keepdim=True).bfloat16()
        codes = (latent * (1 / mean)).round().clamp(-1, 1)
        # The order of that sum is not the canonical one: a mean may round otherwise.
        assert ((stored.sign() != codes).sum(-1) > 0).float().mean() < 0.2
        assert not torch.equal(stored.sign(), fake_quantize(latent, -1).sign())
    else:
        assert torch.equal(stored, fake_quantize(latent, group_size, 1e-5, quant["grid"]))


LONGROPE = {
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 40,
}


@pytest.mark.parametrize("model", [MUP, {"rope_scaling": LONGROPE}], ids=["minicpm", "longrope"])
def test_other_architectures(model, changed, tmp_path):
    report = convert(changed(model=model), tmp_path / "out")
    assert report["verify"]["differing_codes"] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if "rope_scaling" in model:
        assert config["rope_scaling"].items() >= LONGROPE.items()
        assert config["architectures"] == ["LlamaForCausalLM"]
    else:
        assert config["architectures"] == ["MiniCPMForCausalLM"]
        assert config.items() >= {key: model[key] for key in model if "_" in key}.items()
