"""The rules that span fields; each broken one becomes one line with its fix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from operator import attrgetter

from megatron_bitcpm.arch.tensors import FAMILIES
from megatron_bitcpm.config.sections import RunConfig
from megatron_bitcpm.quant.settings import TENSOR, WHOLE_ROW

_AXES = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
}


def cross_field_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """Yield every broken rule that spans fields, one line each; each field alone is in range."""
    yield from _layout_problems(config, world_size)
    yield from _model_problems(config)
    yield from _rope_problems(config)
    yield from _batch_problems(config, world_size)
    yield from _communication_problems(config)
    yield from _data_problems(config)
    yield from _schedule_problems(config)
    yield from _run_problems(config)
    if config.quant.enabled:
        yield from _quant_problems(config)


def _useless(config: RunConfig, field: str, why: str, fix: str = "Remove it") -> str:
    """Return the line about a setting that does nothing beside others."""
    return f"{field}={attrgetter(field)(config)}: has no effect {why}. {fix}."


def _layout_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    model, layout = config.model, config.parallel.layout
    size = layout.model_parallel_size
    if world_size % size:
        yield (
            f"parallel=tp {layout.tp} x pp {layout.pp} x cp {layout.cp}: {size} does not divide "
            f"the world size {world_size}. Start a multiple of {size} ranks."
        )
    for axis, rule in layout.problems(model):
        yield f"{_AXES[axis]}={getattr(layout, axis)}: {rule}. {layout.suggest(axis, model)}."
    multiple = model.make_vocab_size_divisible_by
    if multiple % layout.tp:
        yield (
            f"model.make_vocab_size_divisible_by={multiple}: is not a multiple of {_AXES['tp']} "
            f"{layout.tp}. Use a multiple of {layout.tp}."
        )


def _model_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads={heads}: does not divide hidden_size {model.hidden_size}. "
            "Use a divisor, or set model.kv_channels."
        )
    if model.head_dim % 2:
        yield (
            f"model.kv_channels={model.head_dim}: RoPE needs an even head dimension. Use an even "
            "number."
        )
    if heads % groups:
        divisors = ", ".join(str(d) for d in range(1, min(heads, 64) + 1) if heads % d == 0)
        yield (
            f"model.num_query_groups={groups}: does not divide num_attention_heads {heads}. Use "
            f"{divisors}."
        )
    needed = model.family.constants
    for name in dict.fromkeys(name for family in FAMILIES.values() for name in family.constants):
        value = getattr(model, name)
        if name in needed and value is None:
            yield f"model.{name}=(absent): is required by {model.architecture}. Add the key."
        elif name not in needed and value is not None:
            why = f"with architecture {model.architecture}"
            yield _useless(config, f"model.{name}", why, "Remove it, or use minicpm")


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
    original, longest = rope.original_max_position_embeddings, model.max_position_embeddings
    field = "model.rope_scaling.original_max_position_embeddings"
    if original is None:
        yield f"{field}=(absent): is required. Add the key."
    elif original > longest:
        yield (
            f"{field}={original}: exceeds model.max_position_embeddings {longest}. Raise the "
            "latter."
        )


def _batch_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    training, layout = config.training, config.parallel.layout
    dp = max(1, world_size // layout.model_parallel_size)
    samples = training.micro_batch_size * dp
    batch = training.global_batch_size
    if batch % samples:
        yield (
            f"training.global_batch_size={batch}: is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x dp {dp}. Use a multiple of {samples}."
        )
    elif layout.vpp > 1 and batch // samples % layout.pp:
        yield (
            f"training.global_batch_size={batch}: gives {batch // samples} micro-batches, the "
            f"interleaved schedule needs a multiple of pp {layout.pp}. Use a multiple of "
            f"{samples * layout.pp}."
        )


def _communication_problems(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield _useless(config, "parallel.sequence_parallel", "with tensor_model_parallel_size 1")
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        why = "without use_distributed_optimizer"
        fix = "Remove it, or set parallel.use_distributed_optimizer=true"
        yield _useless(config, "parallel.overlap_param_gather", why, fix)
    elif parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather=True: needs overlap_grad_reduce. Set "
            "parallel.overlap_grad_reduce=true."
        )
    # Only overlapped communication is cut into buckets.
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        fix = "Remove it, or set parallel.overlap_grad_reduce=true"
        yield _useless(config, "parallel.ddp_bucket_size", "without overlap_grad_reduce", fix)


def _data_problems(config: RunConfig) -> Iterator[str]:
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
    least = 1 / (training.micro_batch_size * config.data.seq_length)
    if scale is not None and training.precision != "fp16":
        why = f"with training.precision {training.precision}"
        yield _useless(config, "optimizer.initial_loss_scale", why)
    elif scale is not None and scale < least:
        yield (
            f"optimizer.initial_loss_scale={scale}: is below the smallest scale, 1 / tokens of a "
            f"micro-batch = {least:g}. Use a larger one, or leave it out."
        )
    if guard.loss_spike_threshold is None:
        for name in guard.changed("loss_spike_window", "max_spikes"):
            yield _useless(config, f"guard.{name}", "without guard.loss_spike_threshold")
    if guard.action == "stop" and guard.changed("max_rollbacks"):
        yield _useless(config, "guard.max_rollbacks", "with guard.action stop")
    interval, every = checkpoint.save_interval, checkpoint.keep_every_n
    if guard.action == "rollback":
        nothing = "guard.action=rollback: there is no checkpoint to return to"
        if interval is None:
            yield f"{nothing} before the last step. Set checkpoint.save_interval."
        elif interval >= training.train_iters:
            yield (
                f"{nothing}: save_interval {interval} is not shorter than training.train_iters "
                f"{training.train_iters}. Use a shorter interval."
            )
    if checkpoint.async_save and interval is None:
        yield _useless(config, "checkpoint.async_save", "without checkpoint.save_interval")
    if every is not None and checkpoint.keep_last_n is None:
        yield _useless(config, "checkpoint.keep_every_n", "without checkpoint.keep_last_n")
    elif every is not None and interval is not None and every % interval:
        yield (
            f"checkpoint.keep_every_n={every}: is not a multiple of checkpoint.save_interval "
            f"{interval}. Use a multiple."
        )


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    optimizer, iters = config.optimizer, config.training.train_iters
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr={optimizer.min_lr}: exceeds optimizer.lr {optimizer.lr}. Use a "
            "smaller value."
        )
    if optimizer.lr_decay_style == "constant" and optimizer.min_lr > 0:
        fix = "Remove it, or use WSD or cosine"
        yield _useless(config, "optimizer.min_lr", "with lr_decay_style constant", fix)
    if optimizer.lr_decay_style != "WSD":
        why = f"with lr_decay_style {optimizer.lr_decay_style}"
        for name in optimizer.changed("lr_wsd_decay_iters", "lr_wsd_decay_style"):
            yield _useless(config, f"optimizer.{name}", why, "Remove it, or use WSD")
    warmup, decay = optimizer.lr_warmup_iters, optimizer.wsd_decay_iters(iters)
    if warmup >= iters:
        yield (
            f"optimizer.lr_warmup_iters={warmup}: is not shorter than training.train_iters "
            f"{iters}. Use a shorter warm-up."
        )
    elif optimizer.lr_decay_style != "WSD" or warmup + decay <= iters:
        return
    elif optimizer.lr_wsd_decay_iters is None:
        yield (
            f"optimizer.lr_warmup_iters={warmup}: with the default decay of {decay} steps exceeds "
            f"training.train_iters {iters}. Use at most {iters - decay}, or set "
            "optimizer.lr_wsd_decay_iters."
        )
    else:
        yield (
            f"optimizer.lr_wsd_decay_iters={decay}: with the warm-up exceeds training.train_iters "
            f"{iters}. Use a shorter decay."
        )


def _quant_problems(config: RunConfig) -> Iterator[str]:
    model, quant = config.model, config.quant
    tp = config.parallel.tensor_model_parallel_size
    size = quant.group_size
    if isinstance(size, int) and size > 0:
        # Row-parallel layers see only their shard of the inputs.
        dims, rows = model.dimensions(), {}
        for spec in model.family.tensors:
            if spec.role == "projection" and spec.inputs is not None:
                name = spec.module.rpartition(".")[2]
                rows[name] = dims.size(spec.inputs) // (tp if spec.row_parallel else 1)
        bad = {name: n for name, n in rows.items() if n % size}
        if bad:
            shared = [g for g in range(1, 1025) if all(n % g == 0 for n in rows.values())]
            near = sorted(shared, key=lambda g: abs(g - size))[:3]
            listed = ", ".join(f"{n} ({name})" for name, n in bad.items())
            fix = f"Use {', '.join(map(str, sorted(near)))} or -1"
            yield f"quant.group_size={size}: does not divide the inputs of a rank, {listed}. {fix}."
    # At tp 1 it is allowed: the setting belongs to the run, whatever its layout of the day.
    if quant.scale_sync == "local" and size != WHOLE_ROW:
        why = "with group_size > 0: such groups never span ranks"
        if size == TENSOR:
            why = "with group_size tensor: its scale is that of all shards"
        yield _useless(config, "quant.scale_sync", why)
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
