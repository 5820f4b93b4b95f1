"""Models that live in memory: small, quick to make and to damage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers.model_factory import MUP, TIED, MemorySource, random_tensors, tiny_model
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import TensorSpec
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.megatron.source import MegatronSource, MegatronTensors
from megatron_bitcpm.quantizer import Quantizer

VOCAB = 50
LLAMA = tiny_model("memory")
MINICPM = tiny_model("memory", **{**MUP, **TIED, "dim_model_base": 24})


@dataclass(frozen=True)
class FusedTensors(MegatronTensors):
    """Fused tensors by name, those of layers as ``N.name``."""

    tensors: dict[str, torch.Tensor]

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
    # Norms near 1 and weights that keep a token's length, so that every layer matters.
    return MemorySource(
        path=Path(form),
        kind="torch_dist",
        form=form,
        model=model,
        vocab_size=vocab_size,
        quantizer=stamp,
        tensors=random_tensors(model, vocab_size, dtype, scale=0.15, norm_mean=1.0),
        side_files=side_files,
    )


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
            padding = found.new_full((rows - len(found), model.hidden_size), 7.0)
            tensors[name] = torch.cat([found, padding])
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
