"""The Llama and MiniCPM decoder as a Megatron GPTModel, for every layout.

RMSNorm before attention and MLP, SwiGLU, rotary embeddings (plain or LongRoPE), grouped queries, no
biases; MiniCPM adds three constants (`mup`). The model is built in full precision;
`megatron_bitcpm.ternarize_` swaps its linears.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.config import ParallelConfig
from megatron_bitcpm.errors import ModelError
from megatron_bitcpm.models.rope import RotaryAngles, softmax_scale
from megatron_bitcpm.models.spec import build_block_spec
from megatron_bitcpm.patching.versions import megatron_version

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def build_transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    params_dtype: torch.dtype,
    recompute: str = "none",
) -> TransformerConfig:
    """Translate the model and parallel sections into Megatron's TransformerConfig.

    Raises ModelError where the installed Megatron cannot share a key head between tensor ranks.
    """
    tp = parallel.tensor_model_parallel_size
    if model.num_query_groups % tp and megatron_version() < (0, 16):
        raise ModelError(
            f"model.num_query_groups={model.num_query_groups}: is not a multiple of "
            f"parallel.tensor_model_parallel_size {tp}, which megatron-core before 0.16 needs. Use "
            f"a tensor-parallel size that divides {model.num_query_groups}, or megatron-core "
            "0.16.1."
        )
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        softmax_scale=softmax_scale(model),
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
        fp16=params_dtype == torch.float16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Batched messages of virtual stages would mix up the chunks' gradients.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,
        # The fused kernels of these need CUDA; an adaptor of the platform may replace them.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        **_RECOMPUTE[recompute],
    )


class Decoder(GPTModel):
    """The model, or one pipeline chunk of it, on this rank, in full precision.

    A GPTModel, with its checkpoint names, whose rotary angles follow the position ids, and with
    MiniCPM's constants. `padded_vocab_size` is of `arch.layout.pad_rows`; the run's `seq_length`
    chooses between LongRoPE's two arrays; `pre_process`, `post_process` and `vp_stage` are of
    `megatron_api.build_pipeline_chunks`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        padded_vocab_size: int,
        seq_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        vpp = config.virtual_pipeline_model_parallel_size or 1
        num_layers = model.num_layers // (config.pipeline_model_parallel_size * vpp)
        super().__init__(
            config,
            build_block_spec(model, num_layers),
            vocab_size=padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            # Before 0.13 GPTModel does not take it.
            **({} if vp_stage is None else {"vp_stage": vp_stage}),
        )
        self.rotary_pos_emb = RotaryAngles(model, seq_length)
        self.embedding_scale = model.scale_emb

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        decoder_input: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return logits, or losses where ``labels`` are given, or hidden states on earlier stages.

        Ids, and labels, are int64 [B, S], S this context-parallel rank's part of the sequence;
        position ids are needed on every stage. `attention_mask` is `document_start` of
        `attention.causal_attention`, the rest as for GPTModel.
        """
        self.rotary_pos_emb.position_ids = position_ids
        if self.embedding_scale is not None and self.pre_process and decoder_input is None:
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
            decoder_input = embedded * self.embedding_scale
        output: torch.Tensor = super().forward(
            input_ids, position_ids, attention_mask, decoder_input, **kwargs
        )
        return output
