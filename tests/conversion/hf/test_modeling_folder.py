"""Folders with generated code in transformers: they load, compute, save and load again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.model_factory import MUP, tiny_model
from helpers.modeling_folders import (  # noqa: F401
    VOCAB,
    forward_tensors,
    llama_json,
    load,
    make_tensors,
    modules_cache,
    quantizer,
    transformers_log,
    weights_of_forward,
    write_folder,
)
from safetensors.torch import load_file

from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.conversion.hf.modeling.writer import (
    MODELING_FILE,
    check_quantizer_block,
    describe_quantizer,
    trusted_modeling_files,
)
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.models.mup import logits_divisor, residual_scale
from megatron_bitcpm.models.rope import attention_factor, rope_factors
from megatron_bitcpm.quantizer import Quantizer

pytestmark = pytest.mark.both_transformers

IDS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
CASES = {
    "rows": (tiny_model("modeling", kv_channels=32), quantizer()),
    "tied_tp2": (tiny_model("modeling", share_embeddings_and_output_weights=True), quantizer(2)),
    "groups": (tiny_model("modeling"), quantizer(2, group_size=16, grid="five")),
    "local": (tiny_model("modeling"), quantizer(2, scale_sync="local")),
    "tensor_int8": (
        tiny_model("modeling"),
        quantizer(2, group_size="tensor", activation="int8_per_token", grid="half_sym4"),
    ),
    "filters": (
        tiny_model("modeling", num_layers=4),
        quantizer(
            full_precision_first_layers=1,
            full_precision_last_layers=1,
            exclude=("decoder.layers.1.mlp.*", "*.2.self_attention.linear_proj"),
        ),
    ),
    "reciprocal": (tiny_model("modeling"), quantizer(1, "bf16_reciprocal")),
    "minicpm": (tiny_model("modeling", **MUP), quantizer(2, eps=0.08)),
    "minicpm_tied": (
        tiny_model("modeling", **MUP, share_embeddings_and_output_weights=True),
        quantizer(grid="asym4", group_size=32),
    ),
}


@pytest.fixture
def latent(tmp_path):
    """Function: name of a case, dtype -> (folder, tensors, stamp, model)."""

    def make(name, dtype=torch.bfloat16):
        model, stamp = CASES[name]
        tensors = make_tensors(model, dtype)
        folder = write_folder(tmp_path / name, model, "latent", stamp, tensors)
        return folder, tensors, stamp, model

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_forward_multiplies_with_the_values_of_training(name, dtype, latent, monkeypatch):
    folder, tensors, stamp, model = latent(name, dtype)
    seen = weights_of_forward(load(folder), IDS, monkeypatch)
    wanted = forward_tensors(tensors, stamp, model.num_layers)
    quantized = 0
    for tensor_name, want in wanted.items():
        if find_projection(tensor_name) is None:
            continue
        got = seen[tensor_name]
        assert got.dtype == dtype and torch.equal(got, want), tensor_name
        quantized += not torch.equal(want, tensors[tensor_name])
    expected = {"filters": 7 * 2 - 3 - 1}.get(name, 7 * model.num_layers)
    assert quantized == expected


@pytest.mark.parametrize("name", ["rows", "groups", "filters", "tied_tp2"])
def test_logits_are_those_of_a_plain_llama_with_these_values(name, latent, tmp_path):
    folder, tensors, stamp, model = latent(name)
    values = forward_tensors(tensors, stamp, model.num_layers)
    plain = write_folder(tmp_path / "plain", model, "pseudo", None, values)
    assert not (plain / MODELING_FILE).exists()
    with torch.no_grad():
        wanted = load(plain, trust_remote_code=False)(IDS).logits
        assert torch.equal(load(folder)(IDS).logits, wanted)


@pytest.mark.parametrize("form", ["latent", "pseudo", "plain"])
@pytest.mark.parametrize("tied", [False, True])
def test_minicpm_is_a_llama_with_its_constants_multiplied_in(form, tied, tmp_path):
    model = tiny_model("modeling", **MUP, share_embeddings_and_output_weights=tied)
    stamp = quantizer()
    latents = make_tensors(model, torch.float32)
    values = latents if form == "plain" else forward_tensors(latents, stamp, model.num_layers)
    stored = latents if form == "latent" else values
    folder = write_folder(tmp_path / "minicpm", model, form, stamp, stored)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == ("bitcpm" if form == "latent" else "minicpm")
    assert (config["scale_emb"], config["scale_depth"], config["dim_model_base"]) == (12, 1.4, 16)
    output = values["model.embed_tokens.weight" if tied else "lm_head.weight"]
    folded = {"lm_head.weight": output / logits_divisor(model)}
    for name, value in values.items():
        if name == "model.embed_tokens.weight":
            folded[name] = value * 12
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            folded[name] = value * residual_scale(model)
        elif name != "lm_head.weight":
            folded[name] = value
    untied = tiny_model("modeling")
    plain = write_folder(tmp_path / "plain", untied, "plain", None, folded)
    with torch.no_grad():
        got, wanted = load(folder)(IDS).logits, load(plain, trust_remote_code=False)(IDS).logits
    # Factors are applied before instead of after a product: rounding.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    assert wanted.abs().max() > 0.5


@pytest.mark.parametrize("name", ["tied_tp2", "minicpm"])
def test_loading_and_generating_warn_of_nothing(name, latent, transformers_log):  # noqa: F811
    folder, *_ = latent(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder)
        output = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False
        )
    assert output.shape == (2, 36) and transformers_log == []


@pytest.mark.parametrize("name", ["minicpm", pytest.param("groups", marks=pytest.mark.slow)])
def test_the_cache_changes_no_token(name, latent):
    folder, *_ = latent(name, torch.float32)
    model = load(folder)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    with_cache = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **options))
    assert with_cache[:, 24:].unique().numel() > 3


@pytest.mark.parametrize("name", ["tied_tp2", "local", "minicpm"])
def test_state_dict_has_plain_llama_names(name, latent):
    folder, tensors, _, model = latent(name)
    tied = {"lm_head.weight"} if model.share_embeddings_and_output_weights else set()
    loaded = load(folder)
    assert set(loaded.state_dict()) == set(tensors) | tied
    assert {n for n, _ in loaded.named_parameters()} == set(tensors)


@pytest.mark.parametrize("name", ["filters", "tensor_int8", "minicpm_tied"])
def test_saved_folders_keep_the_quantiser(name, latent, tmp_path):
    folder, tensors, _, architecture = latent(name)
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    wanted = json.loads((folder / "config.json").read_text())
    for key in ("architectures", "model_type", "auto_map", "bitcpm_quantizer"):
        assert saved[key] == wanted[key]
    check_quantizer_block(
        saved["bitcpm_quantizer"],
        architecture,
        Quantizer.from_stamp(saved["bitcpm_quantizer"]["quantizer"], folder),
        folder,
    )
    assert trusted_modeling_files(tmp_path / "saved")
    for tensor_name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert torch.equal(tensor, tensors[tensor_name])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_checkpointed_gradients_are_the_same(latent):
    folder, *_ = latent("minicpm", torch.float32)
    gradients = []
    for checkpointing in (False, True):
        model = load(folder).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().max() > 0 for g in gradients[0])


def test_hidden_states_and_attentions_are_recorded(latent):
    folder, *_ = latent("minicpm")
    model = load(folder, attn_implementation="eager")
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True, output_attentions=True)
    assert [len(output.hidden_states), len(output.attentions)] == [3, 2]


def test_a_larger_vocabulary_keeps_the_scaled_embedding(latent):
    folder, *_ = latent("minicpm_tied")
    model = load(folder)
    with torch.no_grad():
        before = model(IDS).logits
        model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
        after = model(IDS).logits
    assert after.shape[-1] == VOCAB + 8 and torch.equal(after[..., :VOCAB], before)


def rope_section(max_positions, original, factor=None):
    short = [1.0 + 0.1 * i for i in range(8)]
    section = {
        "short_factor": short,
        "long_factor": [1.5 * x for x in short],
        "original_max_position_embeddings": original,
        "attention_factor": factor,
    }
    changes = {"max_position_embeddings": max_positions, "rope_scaling": section}
    return tiny_model("modeling", **MUP, **changes)


@pytest.mark.parametrize(("original", "factor"), [(64, None), (32, None), (32, 1.25)])
@pytest.mark.parametrize("length", [16, 48])
def test_longrope_is_that_of_training(length, original, factor, tmp_path):
    """A batch takes the factors of its own length; training those of seq_length."""
    model = rope_section(64, original, factor)
    scaling = model.rope_scaling
    rope = {
        "rope_type": "longrope",
        "factor": 64 / original,
        "short_factor": list(scaling.short_factor),
        "long_factor": list(scaling.long_factor),
        "original_max_position_embeddings": original,
    }
    keys = {"rope_scaling": rope | ({"attention_factor": factor} if factor else {})}
    if original != 64:
        keys["original_max_position_embeddings"] = original
    tensors = make_tensors(model, torch.float32)
    folder = write_folder(tmp_path / "rope", model, "latent", quantizer(), tensors, **keys)
    rotary = load(folder).model.rotary_emb
    positions = torch.arange(length)[None]
    cos, sin = rotary(torch.zeros(1, length, 64), positions)
    exponents = torch.arange(0, 16, 2) / 16
    divisors = torch.tensor(rope_factors(model, length)) * 5000**exponents
    angles = positions[0].double()[:, None] / divisors.double()
    wanted = attention_factor(model)
    assert wanted == (factor or math.sqrt(1 + math.log(64 / original) / math.log(original)))
    torch.testing.assert_close(cos[0, :, :8].double(), angles.cos() * wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin[0, :, 8:].double(), angles.sin() * wanted, rtol=1e-5, atol=1e-5)


def test_without_the_code_latents_do_not_load(latent):
    """A plain Llama would compute with them, and talk nonsense."""
    folder, *_ = latent("rows")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder, trust_remote_code=False)


def test_latents_without_a_quantiser_are_refused(latent):
    folder, *_ = latent("rows")
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("bitcpm_quantizer")
    for broken in (config, config | {"bitcpm_quantizer": block | {"format_version": 2}}):
        (folder / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="bitcpm_quantizer is absent or of another version"):
            load(folder)


def test_a_plain_llama_loads_as_such_beside_a_latent_one(latent, tmp_path):
    folder, tensors, _, model = latent("rows")
    load(folder)
    plain = write_folder(tmp_path / "plain", model, "plain", None, tensors)
    assert type(load(plain, trust_remote_code=True)).__module__.startswith("transformers.models")


@pytest.mark.parametrize(
    ("group_size", "scale_sync", "attention", "output", "down"),
    [
        (-1, "exact", 64, 128, 160),
        (-1, "local", 64, 64, 80),
        (16, "exact", 16, 16, 16),
        ("tensor", "exact", "tensor", "tensor", "tensor"),
    ],
)
def test_groups_and_slices_of_each_projection(group_size, scale_sync, attention, output, down):
    """Tensor parallelism cuts the inputs of o_proj and down_proj, and nobody else's."""
    stamp = quantizer(2, group_size=group_size, scale_sync=scale_sync)
    block = describe_quantizer(tiny_model("modeling", kv_channels=32), stamp)
    wanted = {f"self_attn.{name}_proj": (attention, 1) for name in "qkv"}
    wanted |= {f"mlp.{name}_proj": (attention, 1) for name in ("gate", "up")}
    wanted |= {"self_attn.o_proj": (output, 2), "mlp.down_proj": (down, 2)}
    found = {name: (p["group_size"], p["slices"]) for name, p in block["projections"].items()}
    assert found == wanted and block["full_precision"] == []


def test_an_edited_block_is_refused(latent):
    folder, _, stamp, model = latent("filters")
    block = describe_quantizer(model, stamp)
    check_quantizer_block(block, model, stamp, folder)
    for key, value in (
        ("projections", block["projections"] | {"mlp.up_proj": {"group_size": 32, "slices": 1}}),
        ("full_precision", block["full_precision"][1:]),
        ("form", "pseudo"),
        ("format_version", 2),
    ):
        with pytest.raises(CheckpointError, match=f"bitcpm_quantizer.{key}=.*filters: is not what"):
            check_quantizer_block(block | {key: value}, model, stamp, folder)


def add_file(name, text="print('mine')"):
    def damage(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    return damage


def change_config(**keys):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | keys))

    return damage


def append_to_code(folder):
    with open(folder / MODELING_FILE, "a") as stream:
        stream.write("# harmless\n")


def link_folder(name):
    """A folder of a model that lies elsewhere, where files are not looked at."""

    def damage(folder):
        elsewhere = folder.parent / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "generate.py").write_text("print('mine')")
        (folder / name).symlink_to(elsewhere, target_is_directory=True)

    return damage


def copy_code_into(name):
    def damage(folder):
        (folder / name).mkdir()
        (folder / name / MODELING_FILE).write_bytes((folder / MODELING_FILE).read_bytes())

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        append_to_code,
        lambda folder: (folder / MODELING_FILE).unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        add_file("custom_generate/generate.py"),
        link_folder("custom_generate"),
        link_folder("other"),
        copy_code_into("custom_generate"),
        add_file("adapter_config.json", '{"base_model_name_or_path": "elsewhere"}'),
        add_file("evil.pyc"),
        add_file("tokenization.py"),
        add_file("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["else/where--t.T"]}}'),
        change_config(auto_map={"AutoConfig": "else/where--modeling_bitcpm.BitCPMConfig"}),
        change_config(auto_map={"AutoModel": "modeling_bitcpm.BitCPMForCausalLM"}),
        change_config(model_type="llama"),
        change_config(model_type=["bitcpm"]),
    ],
)
def test_only_our_own_code_is_trusted(damage, latent):
    folder, *_ = latent("rows")
    assert trusted_modeling_files(folder)
    damage(folder)
    assert not trusted_modeling_files(folder)


def test_files_may_be_links_as_in_the_cache_of_the_hub(latent, tmp_path):
    folder, *_ = latent("rows")
    snapshot = tmp_path / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    (tmp_path / "named").symlink_to(snapshot, target_is_directory=True)
    assert trusted_modeling_files(snapshot) and trusted_modeling_files(tmp_path / "named")
    (folder / MODELING_FILE).write_text("print('mine')")
    assert not trusted_modeling_files(snapshot)


def test_copies_in_checkpoints_of_a_trainer_are_trusted(latent):
    folder, *_ = latent("rows")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / MODELING_FILE).write_bytes((folder / MODELING_FILE).read_bytes())
    assert trusted_modeling_files(folder)


@pytest.mark.slow
def test_the_file_needs_nothing_of_this_package(latent, tmp_path):
    """In a process that cannot import it, from a folder of its own."""
    folder, *_ = latent("minicpm")
    code = f"""
import sys
sys.modules["megatron_bitcpm"] = None
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(type(model).__name__, sum(type(m).__name__ == "LinearQuantizer" for m in model.modules()))
print(AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True).scale_depth)
assert "megatron" not in sys.modules
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout.split() == ["BitCPMForCausalLM", "14", "1.4"], result.stderr


def test_config_json_keeps_to_llamas_keys(latent):
    folder, _, _, model = latent("rows")
    config = json.loads((folder / "config.json").read_text())
    added = set(config) - set(llama_json(model, torch.bfloat16))
    assert added == {"auto_map", "bitcpm_quantizer"}
