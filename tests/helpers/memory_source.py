"""Models that live in memory: small, quick to make and to damage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import TensorSpec
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.megatron.source import MegatronSource, MegatronTensors
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.quantizer import Quantizer

LAYERS, HIDDEN, FFN, VOCAB = 3, 64, 96, 50
LLAMA = ModelConfig(
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=24,
    max_position_embeddings=64,
)
MINICPM = LLAMA.model_copy(
    update={
        "architecture": "minicpm",
        "scale_emb": 12.0,
        "scale_depth": 1.4,
        "dim_model_base": 24,
        "share_embeddings_and_output_weights": True,
    }
)


@dataclass(frozen=True, kw_only=True)
class MemorySource(ModelSource):
    """A model whose tensors are in a dictionary.

    Attributes:
        tensors: Hugging Face name -> tensor.
    """

    tensors: dict[str, torch.Tensor]

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class FusedTensors(MegatronTensors):
    """Fused tensors by name, those of layers as ``N.name``."""

    tensors: dict[str, torch.Tensor]

    def read_args(self):
        raise NotImplementedError

    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, spec: TensorSpec, layer: int | None) -> torch.dtype:
        return self.tensor(spec, layer).dtype

    def tensor(self, spec: TensorSpec, layer: int | None) -> torch.Tensor:
        return self.tensors[spec.name if layer is None else f"{layer}.{spec.name}"]


def make_stamp(tp_size: int = 1, numerics: str = "fp32", **quant) -> Quantizer:
    """A quantiser: settings of `QuantConfig`."""
    return Quantizer(QuantConfig(**quant), tp_size, numerics)


def make_latent(
    stamp: Quantizer | None = None,
    model: ModelConfig = LLAMA,
    dtype=torch.bfloat16,
    vocab_size: int = VOCAB,
    side_files: Path | None = None,
) -> MemorySource:
    """A model with random weights; without a stamp it is a plain one."""
    form = "plain" if stamp is None else "latent"
    source = MemorySource(
        path=Path(form),
        kind="torch_dist",
        form=form,
        model=model,
        vocab_size=vocab_size,
        quantizer=stamp,
        tensors={},
        side_files=side_files,
    )
    generator = torch.Generator().manual_seed(0)
    for name, shape in source.shapes().items():
        # Norms near 1 and weights that keep a token's length, so that every layer matters.
        noise = torch.randn(shape, generator=generator) * 0.15
        source.tensors[name] = (noise if len(shape) > 1 else noise + 1).to(dtype)
    return source


def make_pseudo(latent: MemorySource) -> MemorySource:
    """The values of a latent model's forward."""
    tensors = {name: latent.forward_tensor(name).clone() for name in latent.shapes()}
    return dataclasses.replace(latent, path=Path("pseudo"), form="pseudo", tensors=tensors)


def copy_of(source: MemorySource) -> MemorySource:
    """The same model, to damage."""
    tensors = {name: tensor.clone() for name, tensor in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors)


def make_megatron(latent: MemorySource, rows: int) -> MegatronSource:
    """The same model as Megatron stores it, the vocabulary padded to `rows`."""
    model, tensors = latent.model, {}
    for layer in range(model.num_layers):
        hf = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): tensor
            for name, tensor in latent.tensors.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        dim, groups = model.kv_channels, model.num_query_groups
        heads = model.num_attention_heads // groups
        parts = []
        for group in range(groups):
            parts.append(hf["self_attn.q_proj"][group * heads * dim : (group + 1) * heads * dim])
            parts.append(hf["self_attn.k_proj"][group * dim : (group + 1) * dim])
            parts.append(hf["self_attn.v_proj"][group * dim : (group + 1) * dim])
        local = {
            "self_attention.linear_qkv.weight": torch.cat(parts),
            "self_attention.linear_qkv.layer_norm_weight": hf["input_layernorm"],
            "self_attention.linear_proj.weight": hf["self_attn.o_proj"],
            "mlp.linear_fc1.weight": torch.cat([hf["mlp.gate_proj"], hf["mlp.up_proj"]]),
            "mlp.linear_fc1.layer_norm_weight": hf["post_attention_layernorm"],
            "mlp.linear_fc2.weight": hf["mlp.down_proj"],
        }
        tensors |= {f"{layer}.{name}": tensor.clone() for name, tensor in local.items()}
    outside = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
    }
    for name, hf_name in outside.items():
        if hf_name in latent.tensors:
            found = latent.tensors[hf_name]
            tensors[name] = torch.cat([found, found.new_full((rows - len(found), HIDDEN), 7.0)])
    tensors["decoder.final_layernorm.weight"] = latent.tensors["model.norm.weight"].clone()
    return MegatronSource(
        path=Path("megatron"),
        kind="legacy",
        form=latent.form,
        model=model,
        vocab_size=VOCAB,
        quantizer=latent.quantizer,
        tensors=FusedTensors(tensors),
    )
