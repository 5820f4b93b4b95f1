"""config.json in both directions: meaning is kept exactly, or the key is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.model_factory import MUP, TIED, tiny_model

from megatron_bitcpm.arch.hf_config import hf_config, parse_architecture
from megatron_bitcpm.arch.model import ModelConfig, attention_factor
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.hf.config import read_hf_config
from megatron_bitcpm.conversion.hf.modeling.writer import describe_quantizer
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.models.rope import RotaryAngles
from megatron_bitcpm.quantizer import Quantizer

PATH = Path("folder/config.json")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
# The 0.5B's config.json in OpenBMB's form, cut: no model_type, no rope_theta, no tie.
MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
    "bos_token_id": 1,
    "eos_token_id": [2, 73440],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": [1.5] * 8,
        "short_factor": [1.25] * 8,
        "original_max_position_embeddings": 32768,
    },
    "torch_dtype": "bfloat16",
    "vocab_size": 73448,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
}
ROPE = {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [2.5] * 8}


def parse(**changes) -> ModelConfig:
    return parse_architecture({**LLAMA, **changes}, PATH)[0]


def longrope_model(**changes) -> ModelConfig:
    rope = {
        "short_factor": [1.0 + i / 16 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 128,
        **changes,
    }
    return tiny_model("hf", max_position_embeddings=512, rope_scaling=rope)


@pytest.mark.both_transformers
def test_defaults_are_those_of_llama():
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    model = parse()
    assert model.head_dim == reference.head_dim == 16
    assert model.num_query_groups == reference.num_key_value_heads
    assert model.max_position_embeddings == reference.max_position_embeddings
    assert model.layernorm_epsilon == reference.rms_norm_eps
    rope = getattr(reference, "rope_parameters", None) or {"rope_theta": reference.rope_theta}
    assert model.rotary_base == rope["rope_theta"]
    assert model.share_embeddings_and_output_weights is reference.tie_word_embeddings is False


def test_minicpm_in_openbmbs_form():
    model, vocab_size = parse_architecture(MINICPM, PATH)
    assert (model.architecture, vocab_size) == ("minicpm", 73448)
    assert (model.scale_emb, model.scale_depth, model.dim_model_base) == (12.0, 1.4, 256)
    assert model.share_embeddings_and_output_weights is True  # absent: tied
    assert model.rotary_base == 10000
    assert model.rope_scaling.short_factor == (1.25,) * 8
    assert attention_factor(model) == 1.0  # original = max
    untied, _ = parse_architecture({**MINICPM, "tie_word_embeddings": False}, PATH)
    assert untied.share_embeddings_and_output_weights is False


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 500000},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 500000.0, "rope_parameters": {"rope_theta": 500000, "rope_type": "default"}},
    ],
)
def test_plain_rope_of_both_transformers(rope):
    model = parse(**rope)
    assert (model.rotary_base, model.rope_scaling) == (500000, None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {**ROPE, "original_max_position_embeddings": 512}},
        {"rope_scaling": ROPE, "original_max_position_embeddings": 512},
        {
            "rope_scaling": {
                **ROPE,
                "type": "longrope",
                "rope_type": None,
                "attention_factor": None,
                "factor": None,
            },
            "original_max_position_embeddings": 512,
        },
        {
            "rope_parameters": {
                **ROPE,
                "original_max_position_embeddings": 512,
                "factor": 4.0,
                "rope_theta": 10000.0,
            }
        },
        {
            "rope_scaling": {**ROPE, "original_max_position_embeddings": 512},
            "original_max_position_embeddings": 512,
        },
    ],
)
def test_longrope_in_all_its_forms(rope):
    model = parse(max_position_embeddings=2048, **rope)
    assert model.rope_scaling.original_max_position_embeddings == 512
    assert model.rope_scaling.long_factor == (2.5,) * 8
    assert model.rope_scaling.attention_factor is None
    # sqrt(1 + ln 4 / ln 512) = sqrt(1 + 2/9), by hand
    assert attention_factor(model) == pytest.approx((11 / 9) ** 0.5, rel=1e-12)


def test_longrope_without_an_original_length_takes_all_positions():
    model = parse(max_position_embeddings=2048, rope_scaling=ROPE)
    assert model.rope_scaling.original_max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type=mistral: this architecture is not supported"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]: this architecture"),
        ({"layer_types": 5}, "layer_types=5"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x'"),
        ({"rope_scaling": {**ROPE, "original_max_position_embeddings": [512]}}, "must be a whole"),
        ({"attention_bias": True}, "attention_bias=True: this decoder does not compute it"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"hidden_act": "two\nlines"}, "hidden_act=two lines: this decoder does not compute it"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": "a. b"}}, r"says a. b \(folder/"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"sparse_config": {"kernel_size": 32}}, "sparse_config="),
        ({"use_mup": False}, "use_mup=False"),
        ({"vision_config": {"a": 1}}, "vision_config="),
        ({"rope_theta": 10000.5}, r"rope_theta=10000.5: Megatron takes whole numbers"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling.rope_type=linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type=llama3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type=yarn"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type=dynamic"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "differs between layers"),
        ({"rope_scaling": 3}, "rope_scaling=3: is not an object"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor=None: longrope needs a list"),
        ({"rope_scaling": {**ROPE, "long_factor": None}}, "long_factor=None"),
        ({"rope_scaling": {**ROPE, "long_factor": [1.0] * 7}}, r"\(7 numbers\).*16 head channels"),
        ({"rope_scaling": {**ROPE, "long_factor": [0.0] * 8}}, "long_factor="),
        ({"rope_scaling": ROPE, "original_max_position_embeddings": 4096}, "=4096: must be"),
        (
            {
                "rope_scaling": {**ROPE, "original_max_position_embeddings": 8},
                "original_max_position_embeddings": 9,
            },
            "=9: rope_scaling says 8",
        ),
        ({"rope_scaling": {**ROPE, "factor": 4.0}}, r"factor=4.0: .*is 1, and readers disagree"),
        ({"rope_scaling": {**ROPE, "short_mscale": 1.2}}, "short_mscale=1.2"),
        ({"rope_scaling": ROPE, "rope_parameters": {**ROPE, "factor": 1}}, "differs from"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e4}}, "rope_theta=10000.0"),
        ({"hidden_size": None}, r"hidden_size=\(absent\)"),
        ({"hidden_size": "64"}, "hidden_size='64': must be a whole number"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"hidden_size": 10**15}, "must be a whole number from 1 to"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": 66}, "is not a multiple of the 4 heads"),
        ({"head_dim": 15}, "head_dim=15: rotary embeddings need an even number"),
        ({"num_key_value_heads": 3}, "does not divide the 4 attention heads"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ],
)
def test_what_the_decoder_does_not_have_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(**changes)
    assert "\n" not in str(caught.value)
    assert "folder/config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_emb": None}, r"scale_emb=\(absent\): MiniCPM needs a positive number"),
        ({"scale_depth": 0}, "scale_depth=0"),
        ({"dim_model_base": 100.5}, "dim_model_base=100.5: must be a whole number"),
        ({"pretraining_tp": 2}, "pretraining_tp=2: changes the logits of MiniCPM"),
    ],
)
def test_minicpm_needs_its_constants(changes, message):
    with pytest.raises(CheckpointError, match=message):
        parse_architecture({**MINICPM, **changes}, PATH)


MODELS = {
    "llama": tiny_model("hf", layernorm_epsilon=1e-5),
    # the 3B's: head_dim is not hidden / heads
    "wide": tiny_model(
        "hf", hidden_size=80, num_query_groups=1, kv_channels=32, rotary_base=500000, **TIED
    ),
    "longrope": longrope_model(),
    "factor": longrope_model(attention_factor=1.25),
    "released": longrope_model(original_max_position_embeddings=512),
    "minicpm": tiny_model(
        "hf",
        **{**MUP, **TIED, "dim_model_base": 256},
        rope_scaling=longrope_model(original_max_position_embeddings=64).rope_scaling,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_written_and_read_again(name):
    written = json.loads(json.dumps(hf_config(MODELS[name], "bfloat16", 100)))
    assert parse_architecture(written, PATH) == (MODELS[name], 100)
    # and once more, as a source of its own
    again = hf_config(MODELS[name], "bfloat16", 100, original=written)
    assert again == written


@pytest.mark.both_transformers
@pytest.mark.parametrize("name", [n for n in MODELS if n != "minicpm"])
def test_transformers_computes_the_same_angles_from_it(name, tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = MODELS[name]
    transformers.utils.logging.enable_propagation()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, "bfloat16", 100)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.head_dim, config.num_key_value_heads) == (model.head_dim, model.num_query_groups)
    assert config.tie_word_embeddings == model.share_embeddings_and_output_weights
    rotary = LlamaRotaryEmbedding(config)
    for length in (16, model.max_position_embeddings):
        x = torch.zeros(1)
        cos, _ = rotary(x, torch.arange(length)[None])
        ours = RotaryAngles(model, length)
        ours.position_ids = torch.arange(length)[None]
        angles = ours(length)[:, 0, 0]
        assert torch.equal(cos[0], angles.cos() * attention_factor(model))
    transformers.utils.logging.disable_propagation()
    warnings = [record.message for record in caplog.records]
    if name == "factor":  # transformers does not know the names for vLLM
        assert any("short_mscale" in message for message in warnings)
    elif not (name == "longrope" and transformers.__version__ < "5"):  # which wants no key beside
        assert warnings == []


def test_vllms_names_go_with_an_attention_factor():
    written = hf_config(MODELS["factor"], "bfloat16", 100)["rope_scaling"]
    assert written["short_mscale"] == written["long_mscale"] == written["attention_factor"] == 1.25
    # transformers 4 looks for the original length beside, vLLM inside
    written = hf_config(MODELS["longrope"], "bfloat16", 100)
    assert written["original_max_position_embeddings"] == 128
    assert written["rope_scaling"]["original_max_position_embeddings"] == 128


def test_what_is_no_architecture_keeps_its_values():
    model, vocab_size = parse_architecture({**MINICPM, "my_note": "x"}, PATH)
    original = {
        **MINICPM,
        "my_note": "x",
        "initializer_range": 0.1,
        "use_cache": False,
        "transformers_version": "4.36.0",
        "dtype": "bfloat16",
        "bitcpm_quantizer": {},
    }
    ids = {"bos": 1, "eos": 2, "pad": None}
    written = hf_config(model, "bfloat16", vocab_size, ids, original)
    assert written["eos_token_id"] == [2, 73440]
    assert (written["my_note"], written["use_cache"]) == ("x", False)
    assert (written["initializer_range"], written["transformers_version"]) == (0.1, "4.36.0")
    # files that are not copied, other names of what is written, and stamps of other forms
    assert not {"auto_map", "dtype", "rope_parameters", "bitcpm_quantizer"} & written.keys()
    assert written["architectures"] == ["MiniCPMForCausalLM"]


def test_a_llama_made_of_a_minicpm_has_no_constants():
    model = parse_architecture(MINICPM, PATH)[0]
    changes = {"architecture": "llama", "share_embeddings_and_output_weights": False}
    changes |= dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base"))
    llama = ModelConfig(**{**model.model_dump(), **changes})
    written = hf_config(llama, "bfloat16", 73448, original=MINICPM)
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["model_type"] == "llama"
    assert not {"scale_emb", "scale_depth", "dim_model_base", "auto_map"} & written.keys()
    assert parse_architecture(written, PATH)[0] == llama


# -- the stamp ---------------------------------------------------------------------------------


QUANTIZER = Quantizer(QuantConfig(group_size=16, grid="five"), 2)
STAMP = QUANTIZER.stamp()
FACTORS = {
    "scale_emb": 12.0,
    "residual": 0.5,
    "output": 0.25,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}


def write(folder, config, stamp=None):
    (folder / "config.json").write_text(json.dumps(config))
    if stamp is not None:
        (folder / "bitcpm_quantizer.json").write_text(json.dumps(stamp))


def test_the_form_follows_from_the_stamp(tmp_path):
    write(tmp_path, LLAMA)
    assert read_hf_config(tmp_path).origin.form == "plain"
    block = describe_quantizer(parse(), QUANTIZER)
    for kind in ("llama", "bitcpm"):
        write(tmp_path, {**LLAMA, "model_type": kind, "bitcpm_quantizer": block})
        latent = read_hf_config(tmp_path)
        assert (latent.origin.form, latent.origin.quantizer) == ("latent", QUANTIZER)
        assert latent.model == parse()
    source = {"checkpoint": "iter_0000007", "iteration": 7}
    write(tmp_path, LLAMA, {"quantizer": STAMP, "folding": FACTORS, "source": source})
    pseudo = read_hf_config(tmp_path).origin
    assert (pseudo.form, pseudo.quantizer) == ("pseudo", QUANTIZER)
    assert (pseudo.folding.residual, pseudo.facts) == (0.5, {"iteration": 7})
    (tmp_path / "bitcpm_quantizer.json").unlink()
    write(tmp_path, {**LLAMA, "bitcpm_folding": {**FACTORS, "largest_relative_rounding": 0.004}})
    plain = read_hf_config(tmp_path).origin
    assert (plain.form, plain.quantizer, plain.folding) == ("plain", None, pseudo.folding)


def test_a_latent_minicpm_has_the_constants(tmp_path):
    block = describe_quantizer(parse_architecture(MINICPM, PATH)[0], QUANTIZER)
    config = {**MINICPM, "model_type": "bitcpm", "bitcpm_quantizer": block}
    write(tmp_path, config)
    model = read_hf_config(tmp_path).model
    assert (model.architecture, model.scale_depth) == ("minicpm", 1.4)
    # of the class of this package, not of OpenBMB's
    assert model.share_embeddings_and_output_weights is False
    write(tmp_path, {**config, "scale_depth": None, "dim_model_base": None, "scale_emb": 1.0})
    assert read_hf_config(tmp_path).model.architecture == "llama"
    write(tmp_path, {**config, "bitcpm_quantizer": {**block, "full_precision": ["x"]}})
    with pytest.raises(CheckpointError, match=r"bitcpm_quantizer\.full_precision="):
        read_hf_config(tmp_path)
    del config["bitcpm_quantizer"]
    write(tmp_path, config)
    with pytest.raises(
        CheckpointError, match="model_type=bitcpm: this architecture is not supported"
    ):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "stamp", "message"),
    [
        ({"bitcpm_quantizer": {"form": "latent"}}, {"quantizer": STAMP}, "Remove the one"),
        ({"bitcpm_quantizer": {"form": "pseudo"}}, None, "is not that of a latent folder"),
        ({"bitcpm_quantizer": {"form": "latent"}}, None, "unreadable stamp"),
        ({}, {"quantizer": {**STAMP, "numerics": "fp4"}}, "numerics=fp4"),
        ({}, {"quantizer": STAMP, "folding": {"scale_emb": 1}}, "folding="),
        ({"bitcpm_folding": {**FACTORS, "output": 0}}, None, "output=0: must be greater than 0"),
        ({"bitcpm_folding": {**FACTORS, "output": True}}, None, "output=True: must be a valid"),
    ],
)
def test_damaged_stamps(config, stamp, message, tmp_path):
    write(tmp_path, {**LLAMA, **config}, stamp)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_hf_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": ' * 100_000])
def test_a_damaged_config_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_hf_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "dtype"),
    [
        ("dtype", "float16", torch.float16),
        ("torch_dtype", "bfloat16", torch.bfloat16),
        ("torch_dtype", None, None),
        ("dtype", "auto", None),
    ],
)
def test_the_declared_type(key, value, dtype, tmp_path):
    write(tmp_path, {**LLAMA, key: value})
    assert read_hf_config(tmp_path).dtype == dtype
    write(tmp_path, {**LLAMA, "torch_dtype": "nn"})
    with pytest.raises(CheckpointError, match="torch_dtype=nn: is not a type of torch"):
        read_hf_config(tmp_path)
