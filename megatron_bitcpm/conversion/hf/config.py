"""config.json of a Hugging Face folder and the architecture of this package, in both directions.

Known are Llama and MiniCPM. What this package's decoder cannot compute is refused by name when
reading: an ignored setting would mean silently other numbers. Written is the form that transformers
4.x, transformers 5.x and vLLM all read. Neither transformers nor tokenizers is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.conversion.hf.modeling.writer import (
    LATENT_TYPE,
    QUANTIZER_KEY,
    check_quantizer_block,
)
from megatron_bitcpm.conversion.hf.rope import RopeProblem, read_rope, write_rope
from megatron_bitcpm.conversion.source import Folding, Form
from megatron_bitcpm.conversion.stamp import QuantizerStamp, parse_stamp
from megatron_bitcpm.data.tokenizer_ids import VOCABULARY_FILES, TokenizerIds
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import TOKENIZER_FILES, hash_files, read_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
QUANTIZER_FILE = "bitcpm_quantizer.json"

FOLDING_KEY = "bitcpm_folding"
"""Of config.json, in folded models without a quantiser."""

MODEL_CLASSES = {"llama": "LlamaForCausalLM", "minicpm": "MiniCPMForCausalLM"}
"""Model type -> class in ``architectures``."""
_TIED_BY_DEFAULT = {"llama": False, "minicpm": True, LATENT_TYPE: False}
"""What an absent tie_word_embeddings means in the configuration class of each model type; of
minicpm that of OpenBMB."""
_MUP_KEYS = ("scale_emb", "scale_depth", "dim_model_base")
_MAX_SIZE = 2**24
"""Of vocabulary and context."""
_MAX_WIDTH = 2**20
"""Of everything else, and of all heads together. Ten times the largest model there is; what is far
above it would take all memory before a tensor is looked at."""
_MAX_LAYERS = 4096
_MAX_VOLUME = 2**27
"""Of layers times width."""

_LIMITS = {
    "num_hidden_layers": _MAX_LAYERS,
    "vocab_size": _MAX_SIZE,
    "max_position_embeddings": _MAX_SIZE,
}
_FIX_SIZE = "Correct it (bitcpm inspect --fix-config reads sizes from the weights)"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (1,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "n_routed_experts": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1,),
    "qkv_bias": (False,),
    "quantization_config": (),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rotary_pct": (1,),
    "sparse_config": (),
    "text_config": (),
    "use_bias": (False,),
    "use_mup": (True,),
    "use_qk_norm": (False,),
    "vision_config": (),
}
"""Settings that change the computation -> values (besides null) with which they do not."""

_REPLACED = (
    "auto_map",
    "dtype",
    "original_max_position_embeddings",
    FOLDING_KEY,
    QUANTIZER_KEY,
    "rope_parameters",
    *_MUP_KEYS,
)
"""Keys of an original config.json that are never carried over; `hf_config` says them anew."""


@dataclass(frozen=True)
class HfConfig:
    """What the JSON files of a folder say.

    Attributes:
        path: the config.json.
        model: the architecture.
        vocab_size: rows of the embedding.
        dtype: declared type of the weights, None where there is none; the files decide.
        form: by the stamp: latent, pseudo, or plain without one.
        stamp, folding, facts: see `ModelSource`.
    """

    path: Path
    model: ModelConfig
    vocab_size: int
    dtype: torch.dtype | None
    form: Form
    stamp: QuantizerStamp | None
    folding: Folding | None
    facts: dict[str, Any] = field(default_factory=dict)


def read_hf_config(folder: str | Path) -> HfConfig:
    """Read config.json and the quantiser stamp of a folder.

    Raises:
        CheckpointError: absent, damaged, or a model that the decoder cannot express; one line that
            names the file and the key.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    raw = read_json(path)
    model, vocab_size = parse_architecture(raw, path)
    form, stamp, folding, facts = read_stamp(folder, raw)
    if facts.get("tokenizer_sha256") is not None and _has_tokenizer(folder):
        # The model may have been trained on and its tokenizer saved anew; this one goes with it.
        facts["tokenizer_sha256"] = hash_files(folder, TOKENIZER_FILES)
    if form == "latent" and stamp is not None:
        check_quantizer_block(raw[QUANTIZER_KEY], model, stamp, path)
    return HfConfig(path, model, vocab_size, _read_dtype(raw, path), form, stamp, folding, facts)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def parse_architecture(raw: Mapping[str, Any], path: Path) -> tuple[ModelConfig, int]:
    """Return the architecture of a config.json and its vocabulary size.

    Args:
        raw: content of the file.
        path: the file, for messages.

    Raises:
        CheckpointError: as `read_hf_config`.
    """
    kind = find_model_type(raw, path)
    _check_neutral(raw, kind, path)
    size = {
        name: _read_size(raw, name, path)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
    }
    hidden, heads = size["hidden_size"], size["num_attention_heads"]
    key_heads = _read_size(raw, "num_key_value_heads", path, default=heads)
    positions = _read_size(raw, "max_position_embeddings", path, default=2048)
    if raw.get("head_dim") is None and hidden % heads:
        raise _problem(
            path, "hidden_size", hidden, f"is not a multiple of the {heads} heads", "Add head_dim"
        )
    head_dim = _read_size(raw, "head_dim", path, default=hidden // heads)
    if head_dim % 2:
        raise _problem(
            path, "head_dim", head_dim, "rotary embeddings need an even number", "Correct it"
        )
    _check_volume(size, heads * head_dim, path)
    if heads % key_heads:
        raise _problem(
            path,
            "num_key_value_heads",
            key_heads,
            f"does not divide the {heads} attention heads",
            "Correct it",
        )
    try:
        theta, rope = read_rope(raw, positions, head_dim)
    except RopeProblem as error:
        raise _problem(path, error.key, error.value, error.rule, error.fix) from error
    fields: dict[str, Any] = {
        "architecture": kind,
        "num_layers": size["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": size["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": key_heads,
        "kv_channels": None if head_dim * heads == hidden else head_dim,
        "max_position_embeddings": positions,
        "rotary_base": theta,
        "rope_scaling": rope,
        "layernorm_epsilon": 1e-6 if raw.get("rms_norm_eps") is None else raw["rms_norm_eps"],
        "share_embeddings_and_output_weights": is_tied(raw, path),
        **(_read_mup(raw, path) if kind == "minicpm" else {}),
    }
    spread: Any = raw.get("initializer_range")
    if type(spread) in (int, float) and spread > 0:
        fields["init_method_std"] = spread
    try:
        return ModelConfig(**fields), size["vocab_size"]
    except ValidationError as error:
        first = error.errors()[0]
        key = {"layernorm_epsilon": "rms_norm_eps"}.get(str(first["loc"][0]), first["loc"][0])
        raise _problem(path, key, repr(first["input"]), first["msg"], "Correct it") from error


def _check_volume(size: Mapping[str, int], channels: int, path: Path) -> None:
    """Refuse sizes that are too large together; each by itself has passed."""
    if channels > _MAX_WIDTH:
        raise _problem(
            path,
            "num_attention_heads",
            size["num_attention_heads"],
            f"all heads together have {channels} channels, more than {_MAX_WIDTH}",
            _FIX_SIZE,
        )
    width = max(channels, size["hidden_size"], size["intermediate_size"])
    if width * size["num_hidden_layers"] > _MAX_VOLUME:
        raise _problem(
            path,
            "num_hidden_layers",
            size["num_hidden_layers"],
            f"times the width {width} is more than {_MAX_VOLUME}",
            _FIX_SIZE,
        )


def find_model_type(raw: Mapping[str, Any], path: Path) -> str:
    """Return llama or minicpm; early MiniCPM folders name only their class.

    A latent folder has a model type of its own, and the constants when it is a MiniCPM.

    Raises:
        CheckpointError: another architecture.
    """
    kind = raw.get("model_type")
    if kind == LATENT_TYPE and QUANTIZER_KEY in raw:
        has_constants = any(raw.get(key) is not None for key in ("scale_depth", "dim_model_base"))
        return "minicpm" if has_constants else "llama"
    if kind is None:
        classes = raw.get("architectures") or []
        kind = next((k for k, name in MODEL_CLASSES.items() if name in classes), None)
    if not isinstance(kind, str) or kind not in MODEL_CLASSES:
        raise _problem(
            path,
            "model_type",
            kind,
            "is no architecture known here",
            f"Use {' or '.join(MODEL_CLASSES)}",
        )
    return kind


def is_tied(raw: Mapping[str, Any], path: Path) -> bool:
    """Whether the output layer is the embedding; absent means the default of the model type."""
    tied = raw.get("tie_word_embeddings")
    if tied is None:
        kind = find_model_type(raw, path)
        return _TIED_BY_DEFAULT.get(str(raw.get("model_type")), _TIED_BY_DEFAULT[kind])
    if not isinstance(tied, bool):
        raise _problem(
            path, "tie_word_embeddings", repr(tied), "must be true or false", "Correct it"
        )
    return tied


def _check_neutral(raw: Mapping[str, Any], kind: str, path: Path) -> None:
    for key, neutral in _NEUTRAL.items():
        value = raw.get(key)
        if value is not None and value not in neutral:
            raise _problem(
                path, key, value, "this decoder does not compute it", "Use a model without it"
            )
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window", True):
        raise _problem(
            path,
            "sliding_window",
            raw["sliding_window"],
            "this decoder attends to all tokens",
            "Use a model without it",
        )
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise _problem(
            path,
            "layer_types",
            layers,
            "this decoder has full attention only",
            "Use a model without others",
        )
    # OpenBMB's forward leaves out the division of the logits then.
    if kind == "minicpm" and raw.get("pretraining_tp") not in (None, 0, 1):
        raise _problem(
            path,
            "pretraining_tp",
            raw["pretraining_tp"],
            "changes the logits of MiniCPM",
            "Set it to 1",
        )


def _read_size(raw: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    limit = _LIMITS.get(key, _MAX_WIDTH)
    if type(value) is not int or not 1 <= value <= limit:
        raise _problem(
            path, key, _show(value), f"must be a whole number from 1 to {limit}", _FIX_SIZE
        )
    return value


def _read_mup(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in _MUP_KEYS:
        value: Any = raw.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise _problem(
                path,
                key,
                _show(value),
                "MiniCPM needs a positive number",
                "Complete config.json from its source",
            )
        values[key] = value
    if values["dim_model_base"] != int(values["dim_model_base"]):
        raise _problem(
            path, "dim_model_base", values["dim_model_base"], "must be a whole number", "Correct it"
        )
    values["dim_model_base"] = int(values["dim_model_base"])
    return values


def _read_dtype(raw: Mapping[str, Any], path: Path) -> torch.dtype | None:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None or name == "auto":
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise _problem(path, "torch_dtype", name, "is no type of torch", "Use bfloat16 or float32")
    return dtype


def read_stamp(
    folder: Path, raw: Mapping[str, Any]
) -> tuple[Form, QuantizerStamp | None, Folding | None, dict[str, Any]]:
    """Return form, stamp, folding and facts of the training.

    Args:
        folder: the model.
        raw: content of its config.json.

    Raises:
        CheckpointError: a stamp that cannot be read, or two of them.
    """
    inside, beside = raw.get(QUANTIZER_KEY), folder / QUANTIZER_FILE
    if inside is not None and beside.is_file():
        raise CheckpointError(
            f"folder={folder}: config.json has {QUANTIZER_KEY} (latents) and there is a "
            f"{QUANTIZER_FILE} (pseudo-quantised). Remove the one that does not belong to it."
        )
    if inside is not None:
        if not isinstance(inside, Mapping) or inside.get("form") != "latent":
            raise _problem(
                folder / CONFIG_FILE,
                QUANTIZER_KEY,
                inside,
                "is not that of a latent folder",
                "Convert the model again",
            )
        stamp = parse_stamp(inside.get("quantizer"), folder / CONFIG_FILE)
        return "latent", stamp, None, _read_facts(inside)
    if not beside.is_file():
        return "plain", None, _read_folding(raw.get(FOLDING_KEY), folder / CONFIG_FILE), {}
    content = read_json(beside)
    folding = _read_folding(content.get("folding"), beside)
    facts = _read_facts(content)
    if content.get("quantizer") is None:
        return "plain", None, folding, facts
    return "pseudo", parse_stamp(content["quantizer"], beside), folding, facts


def _read_facts(content: Mapping[str, Any]) -> dict[str, Any]:
    facts = content.get("source")
    return {k: v for k, v in facts.items() if k != "checkpoint"} if isinstance(facts, dict) else {}


def _read_folding(content: Any, path: Path) -> Folding | None:
    if content is None:
        return None
    try:
        values = {key: content[key] for key in Folding.__dataclass_fields__}
        if not all(type(v) in (int, float) and 0 < v < math.inf for v in values.values()):
            raise ValueError("its values are no positive numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise _problem(
            path, "folding", content, f"cannot be understood ({error})", "Convert the model again"
        ) from error
    return Folding(**values)


def _show(value: Any) -> str:
    """Return what is no number as one can tell it from a number: in quotes."""
    return "(absent)" if value is None else repr(value)


def _problem(path: Path, key: Any, value: Any, rule: str, fix: str) -> CheckpointError:
    shown = str(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    rule = " ".join(f"{rule} ({path})".split())
    return CheckpointError(f"{key!s}={shown}: {rule}. {fix}.")


def hf_config(
    model: ModelConfig,
    dtype: torch.dtype,
    vocab_size: int,
    ids: TokenizerIds | None = None,
    original: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of config.json; `parse_architecture` reads the same model out of it.

    Args:
        model: the architecture; decides the model type.
        dtype: type of the tensors.
        vocab_size: rows of the embedding.
        ids: special tokens, for a model that comes without a config.json.
        original: the config.json that the model came with: what is no part of the architecture
            (ids, dropout, initialisation, caching, unknown keys) keeps its values.
    """
    kind = model.architecture
    defaults = {
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos if ids else None,
        "eos_token_id": ids.eos if ids else None,
        "initializer_range": model.init_method_std,
        "pad_token_id": ids.pad if ids else None,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    kept = {key: value for key, value in (original or {}).items() if key not in _REPLACED}
    architecture = {
        "attention_bias": False,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        # `dtype` is the newer name of the same key; older readers know `torch_dtype` only.
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        **write_rope(model),
    }
    if kind == "minicpm":
        architecture |= {key: getattr(model, key) for key in _MUP_KEYS}
    rest = {**defaults, **kept, **architecture}
    return {
        "architectures": [MODEL_CLASSES[kind]],
        "model_type": kind,
        **{key: rest[key] for key in sorted(rest) if key not in ("architectures", "model_type")},
    }
