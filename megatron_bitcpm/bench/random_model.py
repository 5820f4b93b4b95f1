"""Models with random weights, in the shapes of real ones."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.arch.hf_config import hf_config
from megatron_bitcpm.arch.model import ModelConfig, shapes_of
from megatron_bitcpm.arch.tensors import Shape
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.hf.modeling.writer import write_modeling_files
from megatron_bitcpm.conversion.hf.tensor_writers import write_safetensors
from megatron_bitcpm.quantizer import Quantizer


def _shape(
    vocab_size: int, layers: int, hidden: int, ffn: int, heads: int, positions: int, **more: Any
) -> tuple[ModelConfig, int]:
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=2,
        max_position_embeddings=positions,
        **more,
    )
    return model, vocab_size


SHAPES = {
    # BitCPM-CANN report, table of models: 1.62 billion parameters, 3.2 GB.
    "1B": _shape(
        73448, layers=28, hidden=2048, ffn=6144, heads=16, positions=4096, kv_channels=128
    ),
    "small": _shape(32768, layers=4, hidden=1024, ffn=4096, heads=16, positions=4096),
    "tiny": _shape(512, layers=2, hidden=64, ffn=128, heads=4, positions=128),
}
"""Name -> architecture and vocabulary size."""


def make_model(plain: Path, latent: Path, model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """Write a Hugging Face folder with random weights, and one that says they are latents.

    Both share one bfloat16 safetensors file. Returns the bytes of the largest tensor, and of all.
    """
    shapes = shapes_of(model, vocab_size)
    plain.mkdir(parents=True)
    latent.mkdir(parents=True)
    layout = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    write_safetensors(plain / "model.safetensors", layout, _random_tensors(shapes))
    os.link(plain / "model.safetensors", latent / "model.safetensors")
    config = hf_config(model, "bfloat16", vocab_size)
    additions = write_modeling_files(latent, model, "latent", Quantizer(QuantConfig()))
    words = {"<s>": 0, "</s>": 1, "a": 2}
    tokenizer = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "a"}}
    for folder, content in ((plain, config), (latent, config | additions)):
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    sizes = [2 * torch.Size(shape).numel() for shape in shapes.values()]
    return max(sizes), sum(sizes)


def _random_tensors(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield normal weights: cuts of one random block, so that gigabytes take seconds."""
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    block = block.to(torch.bfloat16)
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        start = zlib.crc32(name.encode()) % block.numel()
        tensor = block.roll(start).repeat(-(-size // block.numel()))[:size].view(shape)
        yield name, tensor if len(shape) > 1 else tensor + 1
