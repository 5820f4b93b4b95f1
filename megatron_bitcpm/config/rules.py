"""The rules that span fields; each broken one becomes one line with its fix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_bitcpm.config.sections import RunConfig

_TP = "parallel.tensor_model_parallel_size"


def cross_field_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Yield every broken rule that spans fields, one line each.

    Args:
        config: a configuration whose fields are in range, each by itself.
        world_size: ranks of the run.
    """
    yield from _layout_problems(config, world_size)
    yield from _model_problems(config)
    yield from _rope_problems(config)
    yield from _pipeline_problems(config, world_size)
    yield from _communication_problems(config)
    yield from _data_problems(config, world_size)
    yield from _schedule_problems(config)
    yield from _run_problems(config)
    if config.quant.enabled:
        yield from _quant_problems(config)


def _layout_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if world_size % parallel.model_parallel_size == 0:
        return
    if pp == cp == 1:
        yield (
            f"{_TP}={tp}: does not divide the world size {world_size}. Start a multiple of {tp} "
            f"ranks, or use {_divisors_text(world_size)}."
        )
    else:
        yield (
            f"parallel=tp {tp} x pp {pp} x cp {cp}: {parallel.model_parallel_size} does not divide "
            f"the world size {world_size}. Start a multiple of {parallel.model_parallel_size} "
            "ranks."
        )


def _model_problems(config: RunConfig) -> Iterator[str]:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads}: does not divide hidden_size "
            f"{model.hidden_size}. Use a divisor, or set model.kv_channels."
        )
    if model.head_dim % 2:
        yield (
            f"model.kv_channels={model.head_dim}: RoPE needs an even head dimension. Use an even "
            "number."
        )
    if model.num_attention_heads % model.num_query_groups:
        yield (
            f"model.num_query_groups={model.num_query_groups}: does not divide num_attention_heads "
            f"{model.num_attention_heads}. Use {_divisors_text(model.num_attention_heads)}."
        )
    for name in ("num_attention_heads", "ffn_hidden_size", "make_vocab_size_divisible_by"):
        value = getattr(model, name)
        if value % tp:
            yield (
                f"model.{name}={value}: is not a multiple of {_TP} {tp}. Use a multiple of {tp}, "
                f"or tp {_divisors_text(value)}."
            )
    groups = model.num_query_groups
    if groups % tp and tp % groups:
        yield (
            f"model.num_query_groups={groups}: neither divides nor is divided by {_TP} {tp}. Use a "
            f"multiple or a divisor of {tp}."
        )
    for name in ("scale_emb", "scale_depth", "dim_model_base"):
        value = getattr(model, name)
        if model.architecture == "minicpm" and value is None:
            yield f"model.{name}=(absent): is required by architecture minicpm. Add the key."
        elif model.architecture != "minicpm" and value is not None:
            yield (
                f"model.{name}={value}: has no effect with architecture {model.architecture}. "
                "Remove it, or use minicpm."
            )


def _rope_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    rope = model.rope_scaling
    if rope is None:
        return
    wanted = model.head_dim // 2
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if not factors:
            yield (
                f"model.rope_scaling.{name}=(absent): is required. Name a Hugging Face config.json "
                "in model.rope_scaling.hf_config."
            )
        elif len(factors) != wanted:
            yield (
                f"model.rope_scaling.{name}=({len(factors)} numbers): one for each pair of the "
                f"{model.head_dim} head channels is needed, {wanted}. Use the factors of a model "
                "with this head dimension."
            )
    original = rope.original_max_position_embeddings
    if original is None:
        yield (
            "model.rope_scaling.original_max_position_embeddings=(absent): is required. Add the "
            "key."
        )
    elif original > model.max_position_embeddings:
        yield (
            f"model.rope_scaling.original_max_position_embeddings={original}: exceeds "
            f"model.max_position_embeddings {model.max_position_embeddings}. Raise the latter."
        )


def _pipeline_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    model, parallel, training = config.model, config.parallel, config.training
    pp, vpp = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    if vpp is not None and pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={vpp}: has no effect with "
            "pipeline_model_parallel_size 1. Remove it."
        )
    if model.num_layers % parallel.pipeline_chunks:
        yield (
            f"model.num_layers={model.num_layers}: is not a multiple of the "
            f"{parallel.pipeline_chunks} pipeline chunks (pp {pp} x virtual {vpp or 1}). Use a "
            f"multiple of {parallel.pipeline_chunks}."
        )
    dp = max(1, world_size // parallel.model_parallel_size)
    samples = training.micro_batch_size * dp
    if training.global_batch_size % samples:
        yield (
            f"training.global_batch_size={training.global_batch_size}: is not a multiple of "
            f"micro_batch_size {training.micro_batch_size} x dp {dp}. Use a multiple of {samples}."
        )
    elif vpp is not None and training.global_batch_size // samples % pp:
        yield (
            f"training.global_batch_size={training.global_batch_size}: gives "
            f"{training.global_batch_size // samples} micro-batches, the interleaved schedule "
            f"needs a multiple of pp {pp}. Use a multiple of {samples * pp}."
        )


def _communication_problems(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel=True: has no effect with tensor_model_parallel_size 1. "
            "Remove it."
        )
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield (
            "parallel.overlap_param_gather=True: has no effect without use_distributed_optimizer. "
            "Remove it, or set parallel.use_distributed_optimizer=true."
        )
    elif parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather=True: needs overlap_grad_reduce. Set "
            "parallel.overlap_grad_reduce=true."
        )
    # Only overlapped communication is cut into buckets.
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        yield (
            f"parallel.ddp_bucket_size={parallel.ddp_bucket_size}: has no effect without "
            "overlap_grad_reduce. Remove it, or set parallel.overlap_grad_reduce=true."
        )


def _data_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    data, parallel = config.data, config.parallel
    if (data.prefix is None) == (not data.blend):
        yield (
            f"data.prefix={data.prefix or '(absent)'}: exactly one of data.prefix and data.blend "
            "names the training data. Give one of them."
        )
    elif not data.valid and len(data.valid_sets) < len(data.train_sets):
        yield (
            f"data.blend={[entry.prefix for entry in data.blend]}: two prefixes end in the same "
            "name, which names their validation sets. Name the sets in data.valid."
        )
    if data.seq_length > config.model.max_position_embeddings:
        yield (
            f"data.seq_length={data.seq_length}: exceeds model.max_position_embeddings "
            f"{config.model.max_position_embeddings}. Raise the latter or shorten the sequence."
        )
    # Context parallelism gives each rank one piece from the front and one from the back.
    cp = parallel.context_parallel_size
    pieces = 2 * cp if cp > 1 else 1
    if parallel.sequence_parallel:
        pieces = math.lcm(pieces, cp * parallel.tensor_model_parallel_size)
    if data.seq_length % pieces:
        yield (
            f"data.seq_length={data.seq_length}: cannot be cut into {pieces} equal pieces "
            f"(context_parallel_size {cp}, sequence_parallel "
            f"{str(parallel.sequence_parallel).lower()}). Use a multiple of {pieces}."
        )


def _run_problems(config: RunConfig) -> Iterator[str]:
    training, guard, checkpoint = config.training, config.guard, config.checkpoint
    scale = config.optimizer.initial_loss_scale
    if scale is not None and training.precision != "fp16":
        yield (
            f"optimizer.initial_loss_scale={scale}: has no effect with training.precision "
            f"{training.precision}. Remove it."
        )
    least = 1 / (training.micro_batch_size * config.data.seq_length)
    if scale is not None and training.precision == "fp16" and scale < least:
        yield (
            f"optimizer.initial_loss_scale={scale}: is below the smallest scale, 1 / tokens of a "
            f"micro-batch = {least:g}. Use a larger one, or leave it out."
        )
    if guard.loss_spike_threshold is None:
        for name in guard.changed("loss_spike_window", "max_spikes"):
            yield (
                f"guard.{name}={getattr(guard, name)}: has no effect without "
                "guard.loss_spike_threshold. Remove it."
            )
    if guard.action == "stop" and guard.changed("max_rollbacks"):
        yield (
            f"guard.max_rollbacks={guard.max_rollbacks}: has no effect with guard.action stop. "
            "Remove it."
        )
    if guard.action == "rollback" and checkpoint.save_interval is None:
        yield (
            "guard.action=rollback: there is no checkpoint to return to before the last step. Set "
            "checkpoint.save_interval."
        )
    interval = checkpoint.save_interval
    if guard.action == "rollback" and interval is not None and interval >= training.train_iters:
        yield (
            f"guard.action=rollback: there is no checkpoint to return to: save_interval {interval} "
            f"is not shorter than training.train_iters {training.train_iters}. Use a shorter "
            "interval."
        )
    if checkpoint.async_save and interval is None:
        yield (
            "checkpoint.async_save=True: has no effect without checkpoint.save_interval. Remove it."
        )
    if checkpoint.keep_every_n is not None:
        if checkpoint.keep_last_n is None:
            yield (
                f"checkpoint.keep_every_n={checkpoint.keep_every_n}: has no effect without "
                "checkpoint.keep_last_n. Remove it."
            )
        elif checkpoint.save_interval and checkpoint.keep_every_n % checkpoint.save_interval:
            yield (
                f"checkpoint.keep_every_n={checkpoint.keep_every_n}: is not a multiple of "
                f"checkpoint.save_interval {checkpoint.save_interval}. Use a multiple."
            )


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    optimizer, iters = config.optimizer, config.training.train_iters
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr={optimizer.min_lr}: exceeds optimizer.lr {optimizer.lr}. Use a "
            "smaller value."
        )
    if optimizer.lr_decay_style == "constant" and optimizer.min_lr > 0:
        yield (
            f"optimizer.min_lr={optimizer.min_lr}: has no effect with lr_decay_style constant. "
            "Remove it, or use WSD or cosine."
        )
    if optimizer.lr_decay_style != "WSD":
        for name in ("lr_wsd_decay_iters", "lr_wsd_decay_style"):
            value = getattr(optimizer, name)
            if value is not None:
                yield (
                    f"optimizer.{name}={value}: has no effect with lr_decay_style "
                    f"{optimizer.lr_decay_style}. Remove it, or use WSD."
                )
    warmup, decay = optimizer.lr_warmup_iters, optimizer.wsd_decay_iters(iters)
    if warmup >= iters:
        yield (
            f"optimizer.lr_warmup_iters={warmup}: is not shorter than training.train_iters "
            f"{iters}. Use a shorter warm-up."
        )
    elif optimizer.lr_decay_style == "WSD" and warmup + decay > iters:
        if optimizer.lr_wsd_decay_iters is None:
            yield (
                f"optimizer.lr_warmup_iters={warmup}: with the default decay of {decay} steps "
                f"exceeds training.train_iters {iters}. Use at most {iters - decay}, or set "
                "optimizer.lr_wsd_decay_iters."
            )
        else:
            yield (
                f"optimizer.lr_wsd_decay_iters={decay}: with the warm-up exceeds "
                f"training.train_iters {iters}. Use a shorter decay."
            )


def _quant_problems(config: RunConfig) -> Iterator[str]:
    model, quant = config.model, config.quant
    tp = config.parallel.tensor_model_parallel_size
    size = quant.group_size
    if size == 0:
        yield "quant.group_size=0: is not a size. Use -1 for the whole row."
    elif size != "tensor" and size > 0:
        # Row-parallel layers (attention output, fc2) see only their shard of the inputs.
        rows = {
            "hidden_size": model.hidden_size,
            f"attention width / tp {tp}": model.num_attention_heads * model.head_dim // tp,
            f"ffn_hidden_size / tp {tp}": model.ffn_hidden_size // tp,
        }
        bad = {name: n for name, n in rows.items() if n % size}
        if bad:
            shared = [g for g in range(1, 1025) if all(n % g == 0 for n in rows.values())]
            near = sorted(shared, key=lambda g: abs(g - size))[:3]
            listed = ", ".join(f"{n} ({name})" for name, n in bad.items())
            fix = f"Use {', '.join(map(str, sorted(near)))} or -1"
            yield f"quant.group_size={size}: does not divide {listed}. {fix}."
    # At tp 1 it is allowed: the setting belongs to the run, whatever its layout of the day.
    if quant.scale_sync == "local" and size not in (-1, 0):
        reason = (
            "with group_size tensor: its scale is that of all shards"
            if size == "tensor"
            else "with group_size > 0: such groups never span ranks"
        )
        yield f"quant.scale_sync=local: has no effect {reason}. Remove it."
    first, last = quant.full_precision_first_layers, quant.full_precision_last_layers
    if first + last >= model.num_layers:
        yield (
            f"quant.full_precision_first_layers={first}: with full_precision_last_layers {last} "
            f"leaves none of {model.num_layers} layers. Use quant.enabled=false to train in full "
            "precision."
        )
    if quant.requantize == "every_step" and config.training.precision == "fp32":
        yield (
            "quant.requantize=every_step: pure fp32 training has no separate main parameters, so "
            "quantising in place would destroy the latent weights. Use every_forward or auto, or "
            "training.precision=bf16."
        )


def _divisors_text(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)
