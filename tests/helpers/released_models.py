"""Synthetic models in the shapes of the released ones, as Hugging Face folders.

Written with json, safetensors and torch alone: nothing here comes from the package under test.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

LONG_CONTEXT = 32768


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model; `mup` is (scale_emb, scale_depth, dim_model_base) of a MiniCPM."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tied: bool
    mup: tuple[float, float, int] | None
    vocab: int
    layers: int = 2
    max_positions: int = LONG_CONTEXT
    original_positions: int = LONG_CONTEXT
    eps: float = 1e-6

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, by hand and not by the package's table."""
        out: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for i in range(self.layers):
            out |= {
                f"model.layers.{i}.self_attn.q_proj.weight": (queries, self.hidden),
                f"model.layers.{i}.self_attn.k_proj.weight": (keys, self.hidden),
                f"model.layers.{i}.self_attn.v_proj.weight": (keys, self.hidden),
                f"model.layers.{i}.self_attn.o_proj.weight": (self.hidden, queries),
                f"model.layers.{i}.mlp.gate_proj.weight": (self.ffn, self.hidden),
                f"model.layers.{i}.mlp.up_proj.weight": (self.ffn, self.hidden),
                f"model.layers.{i}.mlp.down_proj.weight": (self.hidden, self.ffn),
                f"model.layers.{i}.input_layernorm.weight": (self.hidden,),
                f"model.layers.{i}.post_attention_layernorm.weight": (self.hidden,),
            }
        if not self.tied:
            out["lm_head.weight"] = (self.vocab, self.hidden)
        return out


MUP = (12, 1.4, 256)
RELEASED = {
    "0.5B": Shape(1024, 16, 2, 64, 4096, True, MUP, vocab=73448),
    "1B": Shape(2048, 16, 2, 128, 6144, False, None, vocab=73448),
    # A smaller vocabulary only: these embeddings would be most of the bytes.
    "3B": Shape(2560, 32, 2, 128, 10240, False, None, vocab=8136),
    "8B": Shape(4096, 32, 2, 128, 16384, False, MUP, vocab=8136),
}
"""The four released sizes, cut to two layers."""
TINY = {
    "0.5B": Shape(64, 8, 2, 8, 256, True, MUP, vocab=200, layers=4),
    "1B": Shape(64, 4, 2, 16, 192, False, None, vocab=200, layers=4, eps=1e-5),
    # Attention wider than the residual stream, heads that do not divide it; attention factor > 1.
    "3B": replace(
        Shape(80, 8, 2, 16, 320, False, None, vocab=200, layers=4), original_positions=4096
    ),
    "8B": Shape(128, 8, 2, 16, 512, False, MUP, vocab=200, layers=4),
}
"""The same with everything that is odd about them, small enough for many conversions."""


def rope_factors(shape: Shape) -> tuple[list[float], list[float]]:
    """Short and long factors, one for each frequency, none of them 1."""
    half = shape.head_dim // 2
    short = [1.0 + 0.001 * (i + 1) ** 1.5 for i in range(half)]
    return short, [1.03 + 0.05 * i**1.2 for i in range(half)]


def config_json(shape: Shape) -> dict:
    """The config.json of such a release, in the form of transformers 4.x."""
    short, long = rope_factors(shape)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": [2, shape.vocab - 8],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.1,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": 2,
        "rms_norm_eps": shape.eps,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": shape.original_positions,
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    if shape.mup:
        config |= {
            "architectures": ["MiniCPMForCausalLM"],
            "model_type": "minicpm",
            "scale_emb": shape.mup[0],
            "scale_depth": shape.mup[1],
            "dim_model_base": shape.mup[2],
        }
    return config


def make_tensors(shape: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that look trained on the ternary grid: rows of -s, 0 and s with noise, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in shape.tensors.items():
        noise = torch.empty(size, dtype=torch.bfloat16).normal_(generator=generator)
        if len(size) == 1:
            tensors[name] = 1 + noise.mul_(0.1)
        elif "_proj." in name:
            codes = torch.randint(-3, 4, size, generator=generator, dtype=torch.int8).clamp_(-1, 1)
            scales = torch.rand(size[0], 1, generator=generator).add_(0.5).mul_(0.03).bfloat16()
            tensors[name] = noise.mul_(0.15).add_(codes).mul_(scales)
        else:
            tensors[name] = noise.mul_(0.05)
    return tensors


def write_hf_folder(
    folder: Path,
    shape: Shape,
    tensors: dict[str, torch.Tensor],
    weights: str = "safetensors",
    shards: int = 1,
) -> Path:
    """Write a complete folder: config, weights, tokenizer, chat template, generation settings.

    Args:
        folder: made by this function.
        shape: of the model.
        tensors: from `make_tensors`.
        weights: safetensors or bin.
        shards: weight files; several have an index.
    """
    folder.mkdir(parents=True)
    dump = lambda name, content: (folder / name).write_text(json.dumps(content, indent=2))  # noqa: E731
    dump("config.json", config_json(shape))
    dump(
        "generation_config.json",
        {
            "do_sample": True,
            "top_p": 0.8,
            "temperature": 0.8,
            "bos_token_id": 1,
            "eos_token_id": [2, shape.vocab - 8],
        },
    )
    write_tokenizer(folder, shape.vocab)
    stem, suffix, save = {
        "safetensors": ("model", "safetensors", lambda t, p: save_file(t, p, {"format": "pt"})),
        "bin": ("pytorch_model", "bin", torch.save),
    }[weights]
    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    dump(
        f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A word-level tokenizer of exactly `vocab` ids, with a chat template."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": vocab - 8}
    names = {index: token for token, index in special.items()}
    words = {names.get(index, f"w{index}"): index for index in range(vocab)}
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, index in special.items()
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main() -> None:
    """Write the folders of one of the tables, to convert them by hand."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="folder for the models")
    parser.add_argument("--tiny", action="store_true", help="`TINY` instead of `RELEASED`")
    arguments = parser.parse_args()
    for name, shape in (TINY if arguments.tiny else RELEASED).items():
        write_hf_folder(arguments.output / name, shape, make_tensors(shape), shards=2)


if __name__ == "__main__":
    main()
