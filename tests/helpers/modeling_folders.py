"""Random latent, pseudo and plain models as Hugging Face folders with generated code."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.model_factory import MUP, random_tensors
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import find_projection
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.hf.modeling.writer import write_modeling_files
from megatron_bitcpm.quantizer import Quantizer

VOCAB = 96


def quantizer(tp_size: int = 1, numerics: str = "fp32", **quant) -> Quantizer:
    return Quantizer(QuantConfig(**quant), tp_size, numerics)


def make_tensors(model: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return random_tensors(model, VOCAB, dtype, scale=0.1, norm_mean=1.0)


def forward_tensors(tensors: dict, stamp: Quantizer, num_layers: int) -> dict:
    """The values that a training forward multiplies with."""
    found = {}
    for name, tensor in tensors.items():
        projection = find_projection(name)
        on_grid = projection is not None and stamp.quantizes(projection, num_layers)
        found[name] = stamp.values(tensor, projection.spec) if on_grid else tensor
    return found


def llama_json(model: ModelConfig, dtype: torch.dtype) -> dict:
    """config.json of a Llama or MiniCPM; written out here, independent of the package."""
    constants = [key for key in MUP if key != "architecture" and model.architecture == "minicpm"]
    return {
        **{key: getattr(model, key) for key in constants},
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_scaling": None,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": VOCAB,
    }


def write_folder(folder: Path, model: ModelConfig, form: str, stamp, tensors: dict, **json_keys):
    """Write tensors as a folder; `json_keys` go into config.json."""
    folder.mkdir(parents=True)
    dtype = tensors["model.norm.weight"].dtype
    config = llama_json(model, dtype) | json_keys
    config |= write_modeling_files(folder, model, form, stamp)
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    options = {"dtype": "auto", "trust_remote_code": True, "local_files_only": True} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """Transformers copies remote code to a folder of the user's; here to one of the test."""
    import transformers

    torch.set_num_threads(1)  # such small models wait for threads, above all on a busy machine
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "hf"))
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def transformers_log():
    """What transformers logs from warnings upwards; it does not propagate to pytest."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def weights_of_forward(model, ids, monkeypatch):
    """Name -> what torch's own linear got in one evaluation; not asked of the model."""
    inside, seen = [], {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
    linear = torch.nn.functional.linear

    def spy(x, w, b=None):
        seen[f"{inside[-1]}.weight"] = w.detach().clone()
        return linear(x, w, b)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "linear", spy)
        model.eval()(ids)
    return seen
