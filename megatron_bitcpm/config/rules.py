"""The rules that span fields; each broken one becomes one line with its fix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_bitcpm.config.sections import RunConfig
from megatron_bitcpm.errors import format_problem

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


def _no_effect(field: str, value: object, reason: str, fix: str = "Remove it") -> str:
    return format_problem(field, value, f"has no effect {reason}", fix)


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
        yield format_problem(
            _TP, tp, f"does not divide the world size {world_size}",
            f"Start a multiple of {tp} ranks, or use {_divisors_text(world_size)}",
        )  # fmt: skip
    else:
        yield format_problem(
            "parallel", f"tp {tp} x pp {pp} x cp {cp}",
            f"{parallel.model_parallel_size} does not divide the world size {world_size}",
            f"Start a multiple of {parallel.model_parallel_size} ranks",
        )  # fmt: skip


def _model_problems(config: RunConfig) -> Iterator[str]:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield format_problem(
            "model.num_attention_heads", model.num_attention_heads,
            f"does not divide hidden_size {model.hidden_size}",
            "Use a divisor, or set model.kv_channels",
        )  # fmt: skip
    if model.head_dim % 2:
        yield format_problem(
            "model.kv_channels", model.head_dim, "RoPE needs an even head dimension",
            "Use an even number",
        )  # fmt: skip
    if model.num_attention_heads % model.num_query_groups:
        yield format_problem(
            "model.num_query_groups", model.num_query_groups,
            f"does not divide num_attention_heads {model.num_attention_heads}",
            f"Use {_divisors_text(model.num_attention_heads)}",
        )  # fmt: skip
    for name in ("num_attention_heads", "ffn_hidden_size", "make_vocab_size_divisible_by"):
        value = getattr(model, name)
        if value % tp:
            yield format_problem(
                f"model.{name}", value, f"is not a multiple of {_TP} {tp}",
                f"Use a multiple of {tp}, or tp {_divisors_text(value)}",
            )  # fmt: skip
    groups = model.num_query_groups
    if groups % tp and tp % groups:
        yield format_problem(
            "model.num_query_groups", groups, f"neither divides nor is divided by {_TP} {tp}",
            f"Use a multiple or a divisor of {tp}",
        )  # fmt: skip
    for name in ("scale_emb", "scale_depth", "dim_model_base"):
        value = getattr(model, name)
        if model.architecture == "minicpm" and value is None:
            yield format_problem(
                f"model.{name}", "(absent)", "is required by architecture minicpm", "Add the key"
            )
        elif model.architecture != "minicpm" and value is not None:
            yield _no_effect(
                f"model.{name}", value, f"with architecture {model.architecture}",
                "Remove it, or use minicpm",
            )  # fmt: skip


def _rope_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    rope = model.rope_scaling
    if rope is None:
        return
    wanted = model.head_dim // 2
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if not factors:
            yield format_problem(
                f"model.rope_scaling.{name}", "(absent)", "is required",
                "Name a Hugging Face config.json in model.rope_scaling.hf_config",
            )  # fmt: skip
        elif len(factors) != wanted:
            yield format_problem(
                f"model.rope_scaling.{name}", f"({len(factors)} numbers)",
                f"one for each pair of the {model.head_dim} head channels is needed, {wanted}",
                "Use the factors of a model with this head dimension",
            )  # fmt: skip
    original = rope.original_max_position_embeddings
    if original is None:
        yield format_problem(
            "model.rope_scaling.original_max_position_embeddings", "(absent)", "is required",
            "Add the key",
        )  # fmt: skip
    elif original > model.max_position_embeddings:
        yield format_problem(
            "model.rope_scaling.original_max_position_embeddings", original,
            f"exceeds model.max_position_embeddings {model.max_position_embeddings}",
            "Raise the latter",
        )  # fmt: skip


def _pipeline_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    model, parallel, training = config.model, config.parallel, config.training
    pp, vpp = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    if vpp is not None and pp == 1:
        yield _no_effect(
            "parallel.virtual_pipeline_model_parallel_size", vpp,
            "with pipeline_model_parallel_size 1",
        )  # fmt: skip
    if model.num_layers % parallel.pipeline_chunks:
        yield format_problem(
            "model.num_layers", model.num_layers,
            f"is not a multiple of the {parallel.pipeline_chunks} pipeline chunks "
            f"(pp {pp} x virtual {vpp or 1})",
            f"Use a multiple of {parallel.pipeline_chunks}",
        )  # fmt: skip
    dp = max(1, world_size // parallel.model_parallel_size)
    samples = training.micro_batch_size * dp
    if training.global_batch_size % samples:
        yield format_problem(
            "training.global_batch_size", training.global_batch_size,
            f"is not a multiple of micro_batch_size {training.micro_batch_size} x dp {dp}",
            f"Use a multiple of {samples}",
        )  # fmt: skip
    elif vpp is not None and training.global_batch_size // samples % pp:
        yield format_problem(
            "training.global_batch_size", training.global_batch_size,
            f"gives {training.global_batch_size // samples} micro-batches, the interleaved "
            f"schedule needs a multiple of pp {pp}",
            f"Use a multiple of {samples * pp}",
        )  # fmt: skip


def _communication_problems(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield _no_effect("parallel.sequence_parallel", True, "with tensor_model_parallel_size 1")
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield _no_effect(
            "parallel.overlap_param_gather", True, "without use_distributed_optimizer",
            "Remove it, or set parallel.use_distributed_optimizer=true",
        )  # fmt: skip
    elif parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield format_problem(
            "parallel.overlap_param_gather", True, "needs overlap_grad_reduce",
            "Set parallel.overlap_grad_reduce=true",
        )  # fmt: skip
    # Only overlapped communication is cut into buckets.
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        yield _no_effect(
            "parallel.ddp_bucket_size", parallel.ddp_bucket_size, "without overlap_grad_reduce",
            "Remove it, or set parallel.overlap_grad_reduce=true",
        )  # fmt: skip


def _data_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    data, parallel = config.data, config.parallel
    if (data.prefix is None) == (not data.blend):
        yield format_problem(
            "data.prefix", data.prefix or "(absent)",
            "exactly one of data.prefix and data.blend names the training data",
            "Give one of them",
        )  # fmt: skip
    elif not data.valid and len(data.valid_sets) < len(data.train_sets):
        yield format_problem(
            "data.blend", [entry.prefix for entry in data.blend],
            "two prefixes end in the same name, which names their validation sets",
            "Name the sets in data.valid",
        )  # fmt: skip
    if data.seq_length > config.model.max_position_embeddings:
        yield format_problem(
            "data.seq_length", data.seq_length,
            f"exceeds model.max_position_embeddings {config.model.max_position_embeddings}",
            "Raise the latter or shorten the sequence",
        )  # fmt: skip
    # Context parallelism gives each rank one piece from the front and one from the back.
    cp = parallel.context_parallel_size
    pieces = 2 * cp if cp > 1 else 1
    if parallel.sequence_parallel:
        pieces = math.lcm(pieces, cp * parallel.tensor_model_parallel_size)
    if data.seq_length % pieces:
        yield format_problem(
            "data.seq_length", data.seq_length,
            f"cannot be cut into {pieces} equal pieces (context_parallel_size {cp}, "
            f"sequence_parallel {str(parallel.sequence_parallel).lower()})",
            f"Use a multiple of {pieces}",
        )  # fmt: skip


def _run_problems(config: RunConfig) -> Iterator[str]:
    training, guard, checkpoint = config.training, config.guard, config.checkpoint
    scale = config.optimizer.initial_loss_scale
    if scale is not None and training.precision != "fp16":
        yield _no_effect(
            "optimizer.initial_loss_scale", scale, f"with training.precision {training.precision}"
        )
    least = 1 / (training.micro_batch_size * config.data.seq_length)
    if scale is not None and training.precision == "fp16" and scale < least:
        yield format_problem(
            "optimizer.initial_loss_scale", scale,
            f"is below the smallest scale, 1 / tokens of a micro-batch = {least:g}",
            "Use a larger one, or leave it out",
        )  # fmt: skip
    if guard.loss_spike_threshold is None:
        for name in guard.changed("loss_spike_window", "max_spikes"):
            yield _no_effect(
                f"guard.{name}", getattr(guard, name), "without guard.loss_spike_threshold"
            )
    if guard.action == "stop" and guard.changed("max_rollbacks"):
        yield _no_effect("guard.max_rollbacks", guard.max_rollbacks, "with guard.action stop")
    if guard.action == "rollback" and checkpoint.save_interval is None:
        yield format_problem(
            "guard.action", "rollback", "there is no checkpoint to return to before the last step",
            "Set checkpoint.save_interval",
        )  # fmt: skip
    interval = checkpoint.save_interval
    if guard.action == "rollback" and interval is not None and interval >= training.train_iters:
        yield format_problem(
            "guard.action", "rollback",
            f"there is no checkpoint to return to: save_interval {interval} is not shorter than "
            f"training.train_iters {training.train_iters}", "Use a shorter interval",
        )  # fmt: skip
    if checkpoint.async_save and interval is None:
        yield _no_effect("checkpoint.async_save", True, "without checkpoint.save_interval")
    if checkpoint.keep_every_n is not None:
        if checkpoint.keep_last_n is None:
            yield _no_effect(
                "checkpoint.keep_every_n", checkpoint.keep_every_n, "without checkpoint.keep_last_n"
            )
        elif checkpoint.save_interval and checkpoint.keep_every_n % checkpoint.save_interval:
            yield format_problem(
                "checkpoint.keep_every_n", checkpoint.keep_every_n,
                f"is not a multiple of checkpoint.save_interval {checkpoint.save_interval}",
                "Use a multiple",
            )  # fmt: skip


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    optimizer, iters = config.optimizer, config.training.train_iters
    if optimizer.min_lr > optimizer.lr:
        yield format_problem(
            "optimizer.min_lr", optimizer.min_lr, f"exceeds optimizer.lr {optimizer.lr}",
            "Use a smaller value",
        )  # fmt: skip
    if optimizer.lr_decay_style == "constant" and optimizer.min_lr > 0:
        yield format_problem(
            "optimizer.min_lr", optimizer.min_lr, "has no effect with lr_decay_style constant",
            "Remove it, or use WSD or cosine",
        )  # fmt: skip
    if optimizer.lr_decay_style != "WSD":
        for name in ("lr_wsd_decay_iters", "lr_wsd_decay_style"):
            value = getattr(optimizer, name)
            if value is not None:
                yield format_problem(
                    f"optimizer.{name}", value,
                    f"has no effect with lr_decay_style {optimizer.lr_decay_style}",
                    "Remove it, or use WSD",
                )  # fmt: skip
    warmup, decay = optimizer.lr_warmup_iters, optimizer.wsd_decay_iters(iters)
    if warmup >= iters:
        yield format_problem(
            "optimizer.lr_warmup_iters", warmup,
            f"is not shorter than training.train_iters {iters}", "Use a shorter warm-up",
        )  # fmt: skip
    elif optimizer.lr_decay_style == "WSD" and warmup + decay > iters:
        if optimizer.lr_wsd_decay_iters is None:
            yield format_problem(
                "optimizer.lr_warmup_iters", warmup,
                f"with the default decay of {decay} steps exceeds training.train_iters {iters}",
                f"Use at most {iters - decay}, or set optimizer.lr_wsd_decay_iters",
            )  # fmt: skip
        else:
            yield format_problem(
                "optimizer.lr_wsd_decay_iters", decay,
                f"with the warm-up exceeds training.train_iters {iters}", "Use a shorter decay",
            )  # fmt: skip


def _quant_problems(config: RunConfig) -> Iterator[str]:
    model, quant = config.model, config.quant
    tp = config.parallel.tensor_model_parallel_size
    size = quant.group_size
    if size == 0:
        yield format_problem("quant.group_size", 0, "is not a size", "Use -1 for the whole row")
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
            yield format_problem(
                "quant.group_size", size,
                "does not divide " + ", ".join(f"{n} ({name})" for name, n in bad.items()),
                f"Use {', '.join(map(str, sorted(near)))} or -1",
            )  # fmt: skip
    # At tp 1 it is allowed: the setting belongs to the run, whatever its layout of the day.
    if quant.scale_sync == "local" and size not in (-1, 0):
        reason = (
            "with group_size tensor: its scale is that of all shards"
            if size == "tensor"
            else "with group_size > 0: such groups never span ranks"
        )
        yield _no_effect("quant.scale_sync", "local", reason)
    first, last = quant.full_precision_first_layers, quant.full_precision_last_layers
    if first + last >= model.num_layers:
        yield format_problem(
            "quant.full_precision_first_layers", first,
            f"with full_precision_last_layers {last} leaves none of {model.num_layers} layers",
            "Use quant.enabled=false to train in full precision",
        )  # fmt: skip
    if quant.requantize == "every_step" and config.training.precision == "fp32":
        yield format_problem(
            "quant.requantize", "every_step",
            "pure fp32 training has no separate main parameters, so quantising in place would "
            "destroy the latent weights", "Use every_forward or auto, or training.precision=bf16",
        )  # fmt: skip


def _divisors_text(n: int) -> str:
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)
