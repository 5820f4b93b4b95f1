"""Build what a run needs from its configuration: model, ternary linears, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_bitcpm.config import OptimizerSettings, RunConfig
from megatron_bitcpm.models.llama import (
    build_llama,
    build_transformer_config,
    count_ternary_linears,
    pad_vocab_size,
)
from megatron_bitcpm.parallel.adam_step import keep_adam_steps_apart
from megatron_bitcpm.parallel.convert import TernaryModel, ternarize_
from megatron_bitcpm.training.runtime import Runtime


@dataclass(frozen=True)
class TrainState:
    """The live objects of a run on this rank.

    Attributes:
        model: the GPTModel itself, inside Float16Module and DDP.
        chunk: the DDP-wrapped model, what Megatron's schedules take.
        ternary: handle on the ternary linears, None in full precision.
    """

    model: GPTModel
    chunk: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ternary: TernaryModel | None
    padded_vocab_size: int


def build_train_state(config: RunConfig, runtime: Runtime, vocab_size: int) -> TrainState:
    """Build model, optimizer and schedule on this rank.

    Args:
        config: the run.
        runtime: this rank's place.
        vocab_size: ids of the tokenizer.
    """
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    padded_vocab_size = pad_vocab_size(vocab_size, config.model)
    transformer = build_transformer_config(
        config.model, dtype, runtime.tp_size, config.training.recompute
    )
    # The random state of initialisation must not depend on what ran before in this process.
    torch.manual_seed(config.training.seed)
    model = build_llama(transformer, config.model, padded_vocab_size).to(runtime.device)
    ternary = None
    if config.quant.enabled:
        ternary = ternarize_(
            model, config.quant, expected=count_ternary_linears(config.model, config.quant)
        )
    wrapped = Float16Module(transformer, model) if transformer.bf16 else model
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(transformer, ddp_config, wrapped)
    optimizer = build_optimizer(config.optimizer, dtype, chunk)
    if ternary is not None:
        ternary.attach_optimizer(optimizer)
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    scheduler = build_scheduler(config, optimizer)
    return TrainState(model, chunk, optimizer, scheduler, ternary, padded_vocab_size)


def build_optimizer(
    settings: OptimizerSettings, dtype: torch.dtype, chunk: DistributedDataParallel
) -> MegatronOptimizer:
    """Build Megatron's AdamW for one wrapped model; vectors and biases do not decay."""
    bf16 = dtype == torch.bfloat16
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=dtype,
        # Megatron checks bf16 gradients for inf and NaN only under a loss scale.
        loss_scale=1.0 if bf16 else None,
    )
    optimizer = get_megatron_optimizer(config, [chunk], get_standard_config_overrides(config))
    keep_adam_steps_apart(optimizer)
    return optimizer


def build_scheduler(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Build Megatron's learning-rate schedule; its steps are optimizer steps.

    A resumed run takes only the number of steps from its checkpoint: the schedule is always the
    configuration's, so that a run can be continued with another one.
    """
    settings, iters = config.optimizer, config.training.train_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=iters,
        wd_incr_style="constant",
        wsd_decay_steps=settings.wsd_decay_iters(iters),
        lr_wsd_decay_style=settings.wsd_decay_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
