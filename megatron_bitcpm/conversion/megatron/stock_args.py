"""The arguments of `pretrain_gpt.py`, as its checkpoints hold them, and a model's configuration.

Stock Megatron and MindSpeed keep the whole command line, an `argparse.Namespace`, as ``args`` in
each legacy shard and in ``common.pt``. `read_args` makes a `ModelConfig` of it and refuses by name
what the decoder here does not compute; `make_args` makes the arguments that their loaders check
and that ``--use-checkpoint-args`` takes over. MiniCPM's constants and LongRoPE have the names of
MindSpeed-LLM.
"""

from __future__ import annotations

import argparse
import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.arch.tensors import FAMILIES
from megatron_bitcpm.conversion.megatron.folder import MAX_LAYERS, OTHER_MODEL
from megatron_bitcpm.errors import refusal
from megatron_bitcpm.records import explain

_REQUIRED = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "is_hybrid_model": (False,),
    "linear_attention_freq": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "num_experts": (None, 0),
    "qk_l2_norm": (False,),
    "qk_layernorm": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "use_rope_scaling": (False,),
    "window_size": (None,),
    # of MindSpeed-LLM
    "add_rmsnorm_offset": (False,),
    "attn_logit_softcapping": (None,),
    "cla_share_factor": (None, 1),
    "dynamic_factor": (None, 1.0),
    "embedding_multiplier_scale": (None, 1.0),
    "input_embeds_norm": (False,),
    "noop_layers": (None,),
    "output_logit_softcapping": (None,),
    "output_multiplier_scale": (None, 1.0),
    "post_norm": (False,),
    "query_pre_attn_scalar": (None,),
    "rope_scaling_type": (None, "longrope"),
    "share_kvstates": (False,),
    "use_glm_rope": (False,),
}
"""Argument -> values under which a model is a Llama or MiniCPM; False also stands for None."""
_WRITTEN = (
    "position_embedding_type",
    "rotary_percent",
    "rotary_interleaved",
    "normalization",
    "apply_layernorm_1p",
    "swiglu",
    "squared_relu",
    "add_bias_linear",
    "add_qkv_bias",
)
"""Those that are written: the loaders' own defaults are of another model."""
_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
)
_ORIGINAL_LENGTH = "rope_scaling_original_max_position_embeddings"
_MAX_SIZE = 2**24
_OPTIONAL = ("make_vocab_size_divisible_by", "init_method_std")
_MINICPM = FAMILIES["minicpm"].constants


@dataclass(frozen=True)
class StockModel:
    """What the arguments of a checkpoint say.

    Attributes:
        padded_vocab_size: rows of the embedding; None where not said.
        vocab_size: ids of the tokenizer; None where not said.
        layout: tensor, pipeline and virtual pipeline size, as tp, pp, vpp.
        facts: iteration, seq_length, tokens where they are known.
    """

    model: ModelConfig
    padded_vocab_size: int | None
    vocab_size: int | None
    layout: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)


def read_args(args: Any, iteration: Any, path: Path) -> StockModel:
    """Make a model's configuration of the arguments of a checkpoint, attributes of an object.

    Raises:
        CheckpointError: an argument is absent, damaged, or of a model that is not computed here.
    """
    values = dict(getattr(args, "__dict__", None) or {})
    if not values:
        raise refusal(path, "has no arguments of a training run (args)", OTHER_MODEL)
    for name, allowed in (_REQUIRED | _ALLOWED).items():
        value = values.get(name)
        if (name in _REQUIRED and name not in values) or not _is_allowed(value, name, allowed):
            wanted = " or ".join(map(repr, allowed))
            rule = f"args.{name}={reprlib.repr(value)}, the model here has {wanted}"
            raise refusal(path, rule, OTHER_MODEL)
    layout = {
        "tp": _read_size(values, "tensor_model_parallel_size"),
        "pp": _read_size(values, "pipeline_model_parallel_size"),
        "vpp": _read_size(values, "virtual_pipeline_model_parallel_size"),
    }
    facts = {"iteration": iteration if type(iteration) is int else 0}
    length, samples = values.get("seq_length"), values.get("consumed_train_samples")
    if type(length) is int:
        facts["seq_length"] = length
        if type(samples) is int and samples:
            facts["tokens"] = samples * length
    return StockModel(
        _read_model(values, path),
        values.get("padded_vocab_size"),
        _read_vocab_size(values),
        layout,
        facts,
    )


def _is_allowed(value: Any, name: str, allowed: tuple[Any, ...]) -> bool:
    if value is None:
        return name not in _REQUIRED
    # An Inert of a pickle equals nothing.
    return any(value == other for other in allowed)


def _read_size(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    return value if type(value) is int and value > 0 else 1


def _read_vocab_size(values: dict[str, Any]) -> int | None:
    size = values.get("vocab_size")
    if type(size) is not int:
        return None
    # The tokenizer for mock data takes its size without the end token.
    kind = values.get("tokenizer_type")
    return size + 1 if isinstance(kind, str) and kind.startswith("Null") else size


def _read_model(values: dict[str, Any], path: Path) -> ModelConfig:
    fields = {name: values.get(name) for name in (*_SIZES, "rotary_base")}
    if not values.get("group_query_attention"):
        fields["num_query_groups"] = fields["num_attention_heads"]
    fields["layernorm_epsilon"] = values.get("norm_epsilon", values.get("layernorm_epsilon"))
    missing = [name for name, value in fields.items() if value is None and name != "kv_channels"]
    if missing:
        raise refusal(path, f"args lack {', '.join(missing)}", OTHER_MODEL)
    fields |= {name: values[name] for name in _OPTIONAL if values.get(name) is not None}
    for name in (*_SIZES, "make_vocab_size_divisible_by"):
        if fields.get(name) is not None:
            _check_size(fields[name], name, path)
    fields["rotary_base"] = _whole(fields["rotary_base"])
    tied = not values.get("untie_embeddings_and_output_weights", False)
    fields["share_embeddings_and_output_weights"] = tied
    fields |= _read_minicpm(values) | _read_rope(values, path)
    try:
        model = ModelConfig(**fields)
    except ValidationError as error:
        raise refusal(path, f"args of model: {explain(error)}", OTHER_MODEL) from error
    _check_model(model, path)
    return model


def _check_size(value: Any, name: str, path: Path) -> None:
    """Refuse what is not a size, and what no model has: a loop over it would not end."""
    limit = MAX_LAYERS if name == "num_layers" else _MAX_SIZE
    if type(value) is not int or not 1 <= value <= limit:
        rule = f"args.{name}={reprlib.repr(value)}, a whole number from 1 to {limit} is needed"
        raise refusal(path, rule, "The arguments are damaged; use another checkpoint")


def _check_model(model: ModelConfig, path: Path) -> None:
    heads, groups, rope = model.num_attention_heads, model.num_query_groups, model.rope_scaling
    if heads % groups:
        rule = f"args.num_query_groups={groups}, does not divide {heads} heads"
        raise refusal(path, rule, OTHER_MODEL)
    if rope is None:
        return
    for name in ("short_factor", "long_factor"):
        count = len(getattr(rope, name))
        if count != model.head_dim // 2:
            rule = f"args.{name} has {count} numbers, {model.head_dim // 2} are needed"
            raise refusal(path, rule, OTHER_MODEL)
    if rope.original_max_position_embeddings is None:
        raise refusal(path, f"args lack {_ORIGINAL_LENGTH}", OTHER_MODEL)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_minicpm(values: dict[str, Any]) -> dict[str, Any]:
    """MindSpeed applies each constant by itself; those that are not set get the neutral value."""
    neutral = dict(
        zip(_MINICPM, (1.0, math.sqrt(values["num_layers"]), values["hidden_size"]), strict=True)
    )
    found = {name: values[name] for name in neutral if values.get(name) is not None}
    if not found:
        return {}
    found = neutral | found
    return {"architecture": "minicpm", **found, "dim_model_base": _whole(found["dim_model_base"])}


def _read_rope(values: dict[str, Any], path: Path) -> dict[str, Any]:
    if values.get("rope_scaling_type") is None:
        return {}
    short, long = values.get("short_mscale"), values.get("long_mscale")
    if not isinstance(short, int | float | None) or short != long:
        shown = f"args.short_mscale={reprlib.repr(short)}, args.long_mscale={reprlib.repr(long)}"
        rule = f"{shown}, one attention factor serves all lengths here"
        raise refusal(path, rule, OTHER_MODEL)
    factors = {}
    for name in ("short_factor", "long_factor"):
        text = values.get(name)
        # MindSpeed splits the command line's text before it trains; converters keep the text.
        factors[name] = text.split(",") if isinstance(text, str) else text
    return {
        "rope_scaling": {
            **factors,
            "original_max_position_embeddings": values.get(_ORIGINAL_LENGTH),
            "attention_factor": short,
        }
    }


def make_args(
    model: ModelConfig,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    dtype: torch.dtype,
    layout: Layout,
    ckpt_format: str,
    transformer_impl: str,
    seq_length: int | None = None,
) -> argparse.Namespace:
    """Return the arguments that a checkpoint of `pretrain_gpt.py` would hold.

    `padded_vocab_size` are the rows of the embedding, `ckpt_format` is torch_dist, or torch for
    legacy shards; `seq_length` of the training is by default the longest.
    """
    fields = {
        name: getattr(model, name)
        for name in (*_SIZES, *_OPTIONAL, "rotary_base")
        if name != "kv_channels"
    }
    fields |= {name: (_REQUIRED | _ALLOWED)[name][0] for name in _WRITTEN}
    fields |= {name: getattr(model, name) for name in FAMILIES[model.architecture].constants}
    return argparse.Namespace(
        **fields | _make_rope(model) | _make_layout(model, layout),
        kv_channels=model.head_dim,
        group_query_attention=model.num_query_groups != model.num_attention_heads,
        seq_length=seq_length or model.max_position_embeddings,
        use_rotary_position_embeddings=False,
        norm_epsilon=model.layernorm_epsilon,
        untie_embeddings_and_output_weights=not model.share_embeddings_and_output_weights,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        ckpt_format=ckpt_format,
        use_dist_ckpt=ckpt_format == "torch_dist",
        transformer_impl=transformer_impl,
        use_mcore_models=True,
        # There is neither optimizer nor random state to look for.
        no_save_optim=True,
        no_save_rng=True,
        iteration=0,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )


def _make_layout(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    is_virtual = layout.vpp > 1
    per_chunk = model.num_layers // (layout.pp * layout.vpp)
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if is_virtual else None,
        "num_layers_per_virtual_pipeline_stage": per_chunk if is_virtual else None,
        "expert_model_parallel_size": 1,
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "world_size": layout.tp * layout.pp,
    }


def _make_rope(model: ModelConfig) -> dict[str, Any]:
    rope = model.rope_scaling
    if rope is None:
        return {}
    return {
        "rope_scaling_type": rope.rope_type,
        "longrope_freqs_type": "mul",
        "short_factor": list(rope.short_factor),
        "long_factor": list(rope.long_factor),
        _ORIGINAL_LENGTH: rope.original_max_position_embeddings,
        "short_mscale": rope.attention_factor,
        "long_mscale": rope.attention_factor,
    }
