"""Model FLOPs of a training step: what the mathematics needs, not what the machine did.

A product of an m x k and a k x n matrix is 2 m k n. Per token, with hidden size h, query width q =
heads x head_dim, key/value width k = groups x head_dim, SwiGLU width f, padded vocabulary V, layers
L and sequence length s, the forward pass is

    2 [ L (h (q + 2k) + q h + 3 h f) + h V ]      linears and output layer
    + L 4 q s / 2                                 scores and their product with the values

and training is three times that: forward, gradients of inputs, gradients of weights. Attention is
causal, so half of the square of scores is counted, as by Megatron-LM of core 0.12.1 and 0.16.1 (it
counted all of it in core 0.10). Recomputation is not counted, nor are embedding look-ups, norms,
rotary embeddings, softmax, the quantiser and the optimizer. The ternary linears count like any
other: their products run in the model's floating-point type.
"""

from __future__ import annotations

from megatron_bitcpm.config import ModelConfig


def training_flops_per_token(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> float:
    """Return the floating-point operations of forward and backward, per token.

    Args:
        model: the architecture.
        padded_vocab_size: rows of the output layer.
        seq_length: tokens in a sequence.
    """
    hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim
    key_value = model.num_query_groups * model.head_dim
    linears = hidden * (query + 2 * key_value) + query * hidden + 3 * hidden * model.ffn_hidden_size
    attention = 4 * query * seq_length / 2
    forward = model.num_layers * (2 * linears + attention) + 2 * hidden * padded_vocab_size
    return 3 * forward


def tflops_per_device(flops_per_token: float, tokens_per_s: float, world_size: int) -> float:
    """Return the achieved model TFLOP/s of one device.

    Args:
        flops_per_token: from `training_flops_per_token`.
        tokens_per_s: of the whole run.
        world_size: devices of the run.
    """
    return flops_per_token * tokens_per_s / world_size / 1e12
