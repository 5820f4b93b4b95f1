"""The JSON side of a Hugging Face Llama folder: config.json, shapes, ids of the tokenizer.

The rotary settings are written in the legacy form (``rope_theta``, ``rope_scaling``), which
transformers 4.x, transformers 5.x and vLLM all read. Neither transformers nor tokenizers is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    # Beside it, a SentencePiece file of another name cuts the text only; the ids are here.
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
"""Files that hold a tokenizer's vocabulary; of several the first one counts."""


@dataclass(frozen=True)
class TokenizerIds:
    """What a model's configuration needs of its tokenizer.

    Attributes:
        size: largest id + 1.
        bos, eos, pad: ids of the begin, end and padding tokens, None where there is none.
    """

    size: int
    bos: int | None
    eos: int | None
    pad: int | None


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        CheckpointError: absent, unreadable or no JSON object; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("holds no JSON object")
        return content
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError.of(
            "file", path, reason.rstrip("."), "Export the model again, or name another folder"
        ) from error


def read_tokenizer_ids(folder: str | Path, vocab_size: int | None = None) -> TokenizerIds:
    """Read sizes and special ids out of a tokenizer folder.

    Args:
        folder: tokenizer folder, or a model folder with one.
        vocab_size: ids of the model, None where they are not known.

    Raises:
        CheckpointError: no such folder, no vocabulary in it, or of another size than the model's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError.of(
            "tokenizer", folder, "no such folder", "Name the tokenizer of the run (--tokenizer)"
        )
    try:
        ids = _read_ids(folder)
    except CheckpointError:
        raise
    # Valid JSON of another form, or a model file that sentencepiece cannot parse.
    except (AttributeError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError.of(
            "tokenizer", folder, f"cannot be understood ({type(error).__name__}: {reason})",
            "Name the tokenizer of the run (--tokenizer)",
        ) from error  # fmt: skip
    if vocab_size is not None and ids.size != vocab_size:
        raise CheckpointError.of(
            "tokenizer", folder, f"its files hold {ids.size} ids, the model has {vocab_size}",
            "Name the tokenizer of the run (--tokenizer), or save it with a tokenizer.json",
        )  # fmt: skip
    return ids


def _read_ids(folder: Path) -> TokenizerIds:
    ids, special = _read_vocabulary(folder)
    if not ids:
        raise CheckpointError.of(
            "tokenizer", folder, f"holds no vocabulary ({', '.join(VOCABULARY_FILES)})",
            "Save it with a tokenizer.json, or name another folder",
        )  # fmt: skip
    if (folder / "added_tokens.json").is_file():
        ids |= read_json(folder / "added_tokens.json")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            for index, token in content.get("added_tokens_decoder", {}).items():
                ids[token["content"]] = int(index)
            special |= {key: content[key] for key in special if key in content}
    for token, index in ids.items():
        # A bool is an int in Python.
        if type(index) is not int or index < 0:
            raise ValueError(f"token {token!r} has id {index!r}")

    def find(key: str) -> int | None:
        token = special[key]
        return ids.get(token["content"] if isinstance(token, dict) else token)

    return TokenizerIds(
        max(ids.values()) + 1, find("bos_token"), find("eos_token"), find("pad_token")
    )


def _read_vocabulary(folder: Path) -> tuple[dict[Any, int], dict[str, Any]]:
    """Return (token -> id, special token by its key) of the first vocabulary file there is.

    Some classes of transformers move the ids of a SentencePiece file or add ids of their own. Their
    ``added_tokens_decoder``, read by the caller, then gives the largest id and the special ones.
    """
    special: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
    name = next((name for name in VOCABULARY_FILES if (folder / name).is_file()), None)
    path = folder / str(name)
    ids: dict[Any, int] = {}
    if name == "tokenizer.json":
        content = read_json(path)
        vocabulary = content["model"]["vocab"]
        # Unigram models list (piece, score) pairs instead.
        if isinstance(vocabulary, list):
            vocabulary = {pair[0]: index for index, pair in enumerate(vocabulary)}
        ids.update(vocabulary)
        ids.update({token["content"]: token["id"] for token in content.get("added_tokens") or ()})
    elif name == "vocab.json":
        ids = dict(read_json(path))
    elif name == "vocab.txt":
        # Not `splitlines`, which would cut at more than line ends.
        with open(path, encoding="utf-8") as lines:
            ids = {line.rstrip("\n"): index for index, line in enumerate(lines)}
    elif name is not None:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
        for key in special:
            index = getattr(processor, key.replace("token", "id"))()
            special[key] = processor.id_to_piece(index) if index >= 0 else None
    return ids, special


def check_expressible(model: ModelConfig) -> None:
    """Refuse a model that a Llama's config.json cannot describe: it would load and compute wrongly.

    Raises:
        CheckpointError: names the setting.
    """
    for field, value in (
        ("architecture", None if model.architecture == "llama" else model.architecture),
        ("rope_scaling", model.rope_scaling and model.rope_scaling.rope_type),
    ):
        if value is not None:
            raise CheckpointError.of(
                f"model.{field}", value, "has no Hugging Face folder yet",
                "Export a Llama without rope_scaling",
            )  # fmt: skip


def llama_config(
    model: ModelConfig, dtype: torch.dtype, vocab_size: int, ids: TokenizerIds
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        model: the architecture.
        dtype: type of the tensors.
        vocab_size: rows of the embedding.
        ids: of the tokenizer that goes with the model.
    """
    check_expressible(model)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "pad_token_id": ids.pad,
        "pretraining_tp": 1,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_scaling": None,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        # `dtype` is the newer name of the same key; older readers know `torch_dtype` only.
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def generation_config(ids: TokenizerIds) -> dict[str, Any]:
    """Return the content of generation_config.json.

    Without a padding token generation pads with the end token, which it would do with a warning.
    """
    return {
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.eos if ids.pad is None else ids.pad,
    }


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that a config.json calls for.

    Raises:
        KeyError: a key is absent.
    """
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (
            ("self_attn.q_proj", (query, hidden)),
            ("self_attn.k_proj", (key_value, hidden)),
            ("self_attn.v_proj", (key_value, hidden)),
            ("self_attn.o_proj", (hidden, query)),
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
            ("mlp.down_proj", (hidden, ffn)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes
