"""config.json of a Hugging Face folder and the architecture of this package, in both directions.

What this package's decoder cannot compute is refused by name when reading: an ignored setting would
mean silently other numbers. Written is the form that transformers 4.x, transformers 5.x and vLLM
all read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_bitcpm.arch.hf_rope import HfProblem, locate_problems, read_rope, write_rope
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import FAMILIES
from megatron_bitcpm.records import rule_of

CONFIG_FILE = "config.json"
QUANTIZER_KEY = "bitcpm_quantizer"
"""Key of a latent model's config.json: the quantiser's stamp and what follows from it."""
FOLDING_KEY = "bitcpm_folding"
"""Key in folded models without a quantiser."""
LATENT_TYPE = "bitcpm"
"""model_type of a folder of latents, whose modelling file quantises them."""

_MAX_SIZE = 2**24
"""Of vocabulary and context."""
_MAX_WIDTH = 2**20
"""Of everything else, and of all heads together. Ten times the largest model there is; what is far
above it would take all memory before a tensor is looked at."""
_MAX_VOLUME = 2**27
"""Of layers times width."""
_LIMITS = {
    "num_hidden_layers": 4096,
    "vocab_size": _MAX_SIZE,
    "max_position_embeddings": _MAX_SIZE,
}
_FIX_SIZE = "Correct it (bitcpm inspect --fix-config reads sizes from the weights)."

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

_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
}
"""Field of `ModelConfig` -> key of a size."""
_REPLACED = {
    "auto_map",
    "dtype",
    "original_max_position_embeddings",
    FOLDING_KEY,
    QUANTIZER_KEY,
    "rope_parameters",
    *(name for family in FAMILIES.values() for name in family.constants),
}
"""Keys of an original config.json that are never carried over; `hf_config` says them anew."""


def parse_architecture(raw: Mapping[str, Any], path: Path) -> tuple[ModelConfig, int]:
    """Return the architecture of a config.json and its vocabulary size.

    Raises:
        CheckpointError: damaged, or a model that the decoder cannot express; names file and key.
    """
    with locate_problems(path):
        return _parse(raw)


def _parse(raw: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    kind = _find_type(raw)
    _check_neutral(raw, kind)
    heads = _read_size(raw, "num_attention_heads")
    defaults = {"num_key_value_heads": heads, "max_position_embeddings": 2048}
    fields: dict[str, Any] = {
        name: _read_size(raw, key, defaults.get(key)) for name, key in _KEYS.items()
    }
    vocab_size, hidden = _read_size(raw, "vocab_size"), fields["hidden_size"]
    if raw.get("head_dim") is None and hidden % heads:
        text = f"is not a multiple of the {heads} heads. Add head_dim."
        raise HfProblem("hidden_size", hidden, text)
    head_dim = _read_size(raw, "head_dim", hidden // heads)
    if head_dim % 2:
        raise HfProblem("head_dim", head_dim, "rotary embeddings need an even number. Correct it.")
    _check_volume(fields, heads * head_dim)
    if heads % fields["num_query_groups"]:
        text = f"does not divide the {heads} attention heads. Correct it."
        raise HfProblem("num_key_value_heads", fields["num_query_groups"], text)
    theta, rope = read_rope(raw, fields["max_position_embeddings"], head_dim)
    fields |= {
        "architecture": kind,
        "kv_channels": None if head_dim * heads == hidden else head_dim,
        "rotary_base": theta,
        "rope_scaling": rope,
        "layernorm_epsilon": 1e-6 if raw.get("rms_norm_eps") is None else raw["rms_norm_eps"],
        "share_embeddings_and_output_weights": _is_tied(raw),
        **{key: _read_constant(raw, key) for key in FAMILIES[kind].constants},
    }
    spread: Any = raw.get("initializer_range")
    if type(spread) in (int, float) and spread > 0:
        fields["init_method_std"] = spread
    try:
        return ModelConfig(**fields), vocab_size
    except ValidationError as error:
        first = error.errors()[0]
        key = {"layernorm_epsilon": "rms_norm_eps"}.get(str(first["loc"][0]), first["loc"][0])
        raise HfProblem(str(key), repr(first["input"]), f"{rule_of(first)}. Correct it.") from error


def _check_volume(fields: Mapping[str, Any], channels: int) -> None:
    """Refuse sizes that are too large together; each by itself has passed."""
    if channels > _MAX_WIDTH:
        text = f"all heads together have {channels} channels, more than {_MAX_WIDTH}. {_FIX_SIZE}"
        raise HfProblem("num_attention_heads", fields["num_attention_heads"], text)
    width = max(channels, fields["hidden_size"], fields["ffn_hidden_size"])
    if width * fields["num_layers"] > _MAX_VOLUME:
        text = f"times the width {width} is more than {_MAX_VOLUME}. {_FIX_SIZE}"
        raise HfProblem("num_hidden_layers", fields["num_layers"], text)


def find_model_type(raw: Mapping[str, Any], path: Path) -> str:
    """Return the family of a config.json; early MiniCPM folders name only their class.

    A latent folder has a model type of its own, and the constants when it is a MiniCPM.
    """
    with locate_problems(path):
        return _find_type(raw)


def _find_type(raw: Mapping[str, Any]) -> str:
    kind = raw.get("model_type")
    if kind == LATENT_TYPE and QUANTIZER_KEY in raw:
        has_constants = any(raw.get(key) is not None for key in ("scale_depth", "dim_model_base"))
        return "minicpm" if has_constants else "llama"
    if kind is None:
        classes = raw.get("architectures") or []
        kind = next((k for k, family in FAMILIES.items() if family.hf_class in classes), None)
    if not isinstance(kind, str) or kind not in FAMILIES:
        text = f"this architecture is not supported. Use {' or '.join(FAMILIES)}."
        raise HfProblem("model_type", kind, text)
    return kind


def is_tied(raw: Mapping[str, Any], path: Path) -> bool:
    """Whether the output layer is the embedding; absent means the default of the model type."""
    with locate_problems(path):
        return _is_tied(raw)


def _is_tied(raw: Mapping[str, Any]) -> bool:
    tied = raw.get("tie_word_embeddings")
    if tied is None:
        return raw.get("model_type") != LATENT_TYPE and FAMILIES[_find_type(raw)].tied_by_default
    if not isinstance(tied, bool):
        raise HfProblem("tie_word_embeddings", repr(tied), "must be true or false. Correct it.")
    return tied


def _check_neutral(raw: Mapping[str, Any], kind: str) -> None:
    for key, neutral in _NEUTRAL.items():
        value = raw.get(key)
        if value is not None and value not in neutral:
            raise HfProblem(key, value, "this decoder does not compute it. Use a model without it.")
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window", True):
        text = "this decoder attends to all tokens. Use a model without it."
        raise HfProblem("sliding_window", raw["sliding_window"], text)
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        text = "this decoder has full attention only. Use a model without others."
        raise HfProblem("layer_types", layers, text)
    # OpenBMB's forward leaves out the division of the logits then.
    if FAMILIES[kind].constants and raw.get("pretraining_tp") not in (None, 0, 1):
        text = "changes the logits of MiniCPM. Set it to 1."
        raise HfProblem("pretraining_tp", raw["pretraining_tp"], text)


def _read_size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    limit = _LIMITS.get(key, _MAX_WIDTH)
    if type(value) is not int or not 1 <= value <= limit:
        raise HfProblem(key, _show(value), f"must be a whole number from 1 to {limit}. {_FIX_SIZE}")
    return value


def _read_constant(raw: Mapping[str, Any], key: str) -> float:
    value: Any = raw.get(key)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        text = "MiniCPM needs a positive number. Complete config.json from its source."
        raise HfProblem(key, _show(value), text)
    number: float = value
    if key != "dim_model_base":
        return number
    if number != int(number):
        raise HfProblem(key, number, "must be a whole number. Correct it.")
    return int(number)


def _show(value: Any) -> str:
    """Return a value, in quotes where it is not a number."""
    return "(absent)" if value is None else repr(value)


def hf_config(
    model: ModelConfig,
    dtype: str,
    vocab_size: int,
    special_ids: Mapping[str, int | None] | None = None,
    original: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of config.json; `parse_architecture` reads the same model out of it.

    `dtype` is torch's name. `original` is the config.json that the model came with: keys that do
    not belong to the architecture (ids, dropout, caching, unknown ones) keep their values.
    `special_ids` (bos, eos, pad -> id) are for a model without one.
    """
    ids = special_ids or {}
    defaults = {
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "pretraining_tp": 1,
        "use_cache": True,
        **{f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "pad")},
    }
    kept = {key: value for key, value in (original or {}).items() if key not in _REPLACED}
    architecture = {
        "attention_bias": False,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "mlp_bias": False,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        # `dtype` is the newer name of the same key; older readers know `torch_dtype` only.
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        **{key: getattr(model, name) for name, key in _KEYS.items()},
        **{key: getattr(model, key) for key in model.family.constants},
        **write_rope(model),
    }
    rest = {**defaults, **kept, **architecture}
    return {
        "architectures": [model.family.hf_class],
        "model_type": model.architecture,
        **{key: rest[key] for key in sorted(rest) if key not in ("architectures", "model_type")},
    }
