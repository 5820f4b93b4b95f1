"""Build what a run needs from its configuration: model, ternary linears, optimizer, schedule."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bitcpm.arch.counts import count_ternary_linears
from megatron_bitcpm.arch.layout import pad_rows
from megatron_bitcpm.config import ParallelConfig, RunConfig
from megatron_bitcpm.models.decoder import Decoder, build_transformer_config
from megatron_bitcpm.parallel.convert import TernaryModel, ternarize_
from megatron_bitcpm.parallel.megatron_api import (
    build_pipeline_chunks,
    check_pipeline_config,
    finalize_gradients,
    get_optimizer,
)
from megatron_bitcpm.training.initialize import initialize_weights_
from megatron_bitcpm.training.runtime import Runtime
from megatron_bitcpm.training.schedule import build_scheduler

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MEAN_LOSS_SCALE = 65536.0  # fp16: first scale of a mean loss


@dataclass(frozen=True)
class TrainState:
    """The live objects of a run on this rank; `ternary` is None in full precision."""

    models: list[GPTModel]
    """One for each virtual pipeline stage."""
    chunks: list[DistributedDataParallel]
    """The same inside Float16Module and DDP, what Megatron's schedules take."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ternary: TernaryModel | None
    padded_vocab_size: int


def build_train_state(config: RunConfig, runtime: Runtime, vocab_size: int) -> TrainState:
    """Build model, optimizer and schedule for a tokenizer's size; collective over all ranks."""
    dtype = DTYPES[config.training.precision]
    padded_vocab_size = pad_rows(vocab_size, config.model.make_vocab_size_divisible_by)
    transformer = build_transformer_config(
        config.model, config.parallel, dtype, config.training.recompute
    )
    check_pipeline_config(transformer)
    build = functools.partial(
        Decoder, transformer, config.model, padded_vocab_size, config.data.seq_length
    )
    models = [model.to(runtime.device) for model in build_pipeline_chunks(build)]
    for model in models:
        initialize_weights_(model, config.training.seed)
    ternary = None
    if config.quant.enabled:
        layers = config.parallel.layout.layers_of_stage(config.model, runtime.pp_rank)
        expected = count_ternary_linears(config.model, config.quant.excludes, layers)
        ternary = ternarize_(models, config.quant, expected)
    chunks = wrap_chunks(models, transformer, config.parallel)
    optimizer = build_optimizer(config, dtype, chunks)
    if ternary is not None:
        ternary.attach_optimizer(optimizer)
    connect_schedule(transformer, chunks, optimizer)
    scheduler = build_scheduler(config, optimizer)
    return TrainState(models, chunks, optimizer, scheduler, ternary, padded_vocab_size)


def wrap_chunks(
    models: list[GPTModel], transformer: TransformerConfig, parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """Wrap the chunks for mixed precision and data parallelism."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather and len(models) > 1,
        bucket_size=parallel.ddp_bucket_size,
    )
    half = transformer.bf16 or transformer.fp16
    return [
        DistributedDataParallel(
            transformer,
            ddp_config,
            Float16Module(transformer, model) if half else model,
            # Later chunks communicate while earlier ones compute: one bucket is enough.
            disable_bucketing=index > 0,
        )
        for index, model in enumerate(models)
    ]


def connect_schedule(
    transformer: TransformerConfig, chunks: list[Any], optimizer: MegatronOptimizer
) -> None:
    """Give Megatron's schedules the functions that they call during a step."""

    def of_chunks(name: str) -> Any:
        functions = [getattr(chunk, name) for chunk in chunks]
        return functions if len(functions) > 1 else functions[0]

    transformer.finalize_model_grads_func = finalize_gradients
    transformer.grad_scale_func = optimizer.scale_loss
    ddp_config = chunks[0].ddp_config
    if ddp_config.overlap_grad_reduce:
        transformer.no_sync_func = of_chunks("no_sync")
        transformer.grad_sync_func = of_chunks("start_grad_sync")
    if ddp_config.overlap_param_gather and len(chunks) > 1:
        transformer.param_sync_func = of_chunks("start_param_sync")


def build_optimizer(
    config: RunConfig, dtype: torch.dtype, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """Build Megatron's AdamW for the wrapped chunks; vectors and biases do not decay."""
    settings = config.optimizer
    # The loss that is scaled is a sum over so many tokens.
    tokens = config.training.micro_batch_size * config.data.seq_length
    bf16 = dtype == torch.bfloat16
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        # Megatron checks bf16 gradients for inf and NaN only under a loss scale.
        loss_scale=1.0 if bf16 else None,
        initial_loss_scale=settings.initial_loss_scale or MEAN_LOSS_SCALE / tokens,
        min_loss_scale=1 / tokens,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    return get_optimizer(optimizer_config, chunks)
