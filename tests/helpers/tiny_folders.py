"""Tiny Hugging Face folders, written with the libraries' own writers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.model_factory import layer_shapes, random_tensors, tiny_model

LAYERS, HIDDEN, VOCAB = 2, 64, 40
MUP = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 32}
MODEL = tiny_model("hf")
PROJECTIONS = {name: shape for name, shape in layer_shapes(MODEL).items() if "proj" in name}


def make_state(tied: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict:
    """All tensors of a model, Gaussian."""
    model = tiny_model("hf", share_embeddings_and_output_weights=tied)
    return random_tensors(model, VOCAB, dtype, scale=0.02, seed=seed, order="norm_second")


def make_folder(folder: Path, state: dict | None = None, minicpm: bool = False) -> Path:
    """A folder with config.json, a tokenizer, settings of generation and a chat template."""
    state = make_state() if state is None else state
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = state["model.norm.weight"].dtype
    config = {
        "architectures": ["MiniCPMForCausalLM" if minicpm else "LlamaForCausalLM"],
        "model_type": "minicpm" if minicpm else "llama",
        "hidden_size": MODEL.hidden_size,
        "intermediate_size": MODEL.ffn_hidden_size,
        "num_hidden_layers": MODEL.num_layers,
        "num_attention_heads": MODEL.num_attention_heads,
        "num_key_value_heads": MODEL.num_query_groups,
        "head_dim": MODEL.head_dim,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": [2, 39],
        "initializer_range": 0.05,
        "tie_word_embeddings": "lm_head.weight" not in state,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **(MUP if minicpm else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {f"t{i}": i for i in range(VOCAB)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    settings = {"bos_token": "t1", "eos_token": "t2", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "t2"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 39], "top_p": 0.8}')
    return folder


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the libraries' own readers."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
