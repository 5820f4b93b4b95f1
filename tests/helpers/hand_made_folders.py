"""Hugging Face folders whose tensors and files are written out by hand, in every layout."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from helpers.model_factory import random_tensors, tiny_model
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.errors import CheckpointError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def make_tensors(dtype=torch.bfloat16):
    """Return the tensors of CONFIG, drawn by hand-written shapes."""
    return random_tensors(tiny_model("by_hand"), 50, dtype, order="layers_last")


def write(folder, tensors, kind="safetensors", shards=1, config=CONFIG):
    """Write a folder in one of its four layouts; return it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, ending = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[kind]
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = {n: tensors[n] for n in names[number::shards]}
        file = f"{stem}.{ending}"
        if shards > 1:
            file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{ending}"
            weight_map |= dict.fromkeys(part, file)
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}.{ending}.index.json").write_text(index)
    return folder


def refused(folder, message):
    """Open a folder, which must be refused in one line; return that."""
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)
