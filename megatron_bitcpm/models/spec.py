"""The layers of a model as Megatron's specs: the stock local layer with four replacements.

Linears stay Megatron's Column- and RowParallelLinear, which `ternarize_` swaps; names of parameters
and of checkpoints stay the stock ones.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.models.attention import CausalAttention
from megatron_bitcpm.models.mup import logits_divisor, residual_scale, scaled_bias_dropout_add
from megatron_bitcpm.models.norm import RMSNorm


def build_block_spec(model: ModelConfig, num_layers: int) -> TransformerBlockSubmodules:
    """Return the spec of one pipeline chunk's layers and of the norm behind the last layer."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    scale = residual_scale(model)
    if scale != 1:
        layer.submodules.self_attn_bda = scaled_bias_dropout_add(scale)
        layer.submodules.mlp_bda = scaled_bias_dropout_add(scale)
    # The last norm's output goes to the output layer alone, tied or not, so that the divisor of the
    # logits can sit in it.
    final_norm = ModuleSpec(module=RMSNorm, params={"divisor": logits_divisor(model)})
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=final_norm)
