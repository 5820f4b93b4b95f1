"""The Llama architecture as a stock Megatron GPTModel.

RMSNorm before attention and MLP, SwiGLU, rotary embeddings, grouped-query attention, no biases. The
model is built in full precision; `megatron_bitcpm.ternarize_` swaps its linears.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bitcpm.config import ModelConfig, QuantConfig
from megatron_bitcpm.quant.selection import is_excluded

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Names of a layer's linears inside it."""


def count_ternary_linears(model: ModelConfig, quant: QuantConfig) -> int:
    """Return how many linears `ternarize_` must swap in the whole model."""
    return sum(
        not is_excluded(f"decoder.layers.{layer}.{linear}", layer, model.num_layers, quant)
        for layer in range(model.num_layers)
        for linear in LINEARS
    )


def pad_vocab_size(vocab_size: int, model: ModelConfig) -> int:
    """Return the rows of the embedding; the same for every tensor-parallel size.

    Padded rows take part in the softmax of training, so a padding that grew with tp would make the
    loss depend on the layout.
    """
    multiple = model.make_vocab_size_divisible_by
    return -(-vocab_size // multiple) * multiple


def build_transformer_config(
    model: ModelConfig,
    params_dtype: torch.dtype,
    tp_size: int = 1,
    recompute: str = "none",
) -> TransformerConfig:
    """Translate our model section into Megatron's TransformerConfig.

    Args:
        model: the architecture.
        params_dtype: float32 or bfloat16.
        tp_size: tensor-parallel size.
        recompute: ``none`` or ``full`` (every layer, uniformly).
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        # Full weights are drawn on the host and cut, so that every tp starts from the same model.
        use_cpu_initialization=True,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        tensor_model_parallel_size=tp_size,
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute == "full" else None,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        # The fused kernels of these need CUDA; an adaptor of the platform may replace them.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )


def build_llama(config: TransformerConfig, model: ModelConfig, padded_vocab_size: int) -> GPTModel:
    """Build the model on this rank, in full precision.

    Args:
        config: from `build_transformer_config`.
        model: the architecture.
        padded_vocab_size: rows of the embedding, see `pad_vocab_size`.
    """
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
    )
