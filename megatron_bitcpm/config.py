"""One YAML file, validated once, frozen.

`load_config` reads the file, applies ``--set key=value`` overrides and returns a `RunConfig`,
or raises one `ConfigError` that lists every problem. A field's own range is checked by its type;
rules that span fields live in `RunConfig.problems`. Keys are Megatron's words where it has one.
All environment variables of the package (``BITCPM_*``) are read here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from megatron_bitcpm.errors import ConfigError, format_problem


def env_cpu_isa() -> str:
    """``BITCPM_CPU_ISA``: the instruction set of the CPU kernels, empty for the best one."""
    return os.environ.get("BITCPM_CPU_ISA", "")


def env_platform() -> str:
    """``BITCPM_PLATFORM``: cpu, cuda or npu, empty to find out."""
    return os.environ.get("BITCPM_PLATFORM", "")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``true`` where a number belongs: pydantic would read it as 1."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if not {int, float}.isdisjoint({annotation, *get_args(annotation)}):
                raise PydanticCustomError("bool_for_number", "must be a number, not true or false")
        return value


class ModelConfig(_Section):
    """The architecture: a Llama decoder (RMSNorm, SwiGLU, RoPE, grouped queries)."""

    architecture: Literal["llama"] = Field("llama", description="Model family.")
    num_layers: int = Field(ge=1, description="Transformer layers.")
    hidden_size: int = Field(ge=8, description="Width of the residual stream.")
    ffn_hidden_size: int = Field(ge=8, description="Width of the SwiGLU hidden layer.")
    num_attention_heads: int = Field(ge=1, description="Query heads.")
    num_query_groups: int = Field(ge=1, description="Key/value heads.")
    kv_channels: int | None = Field(
        None, ge=2, description="Head dimension; default hidden_size / num_attention_heads."
    )
    max_position_embeddings: int = Field(ge=2, description="Longest sequence, in tokens.")
    rotary_base: int = Field(10000, ge=2, description="RoPE theta.")
    layernorm_epsilon: float = Field(1e-6, gt=0, description="RMSNorm epsilon.")
    init_method_std: float = Field(0.02, gt=0, description="Standard deviation at initialisation.")
    share_embeddings_and_output_weights: bool = Field(
        False, description="Tie the input embedding and the output layer."
    )
    make_vocab_size_divisible_by: int = Field(
        128, ge=1, description="The embedding is padded to a multiple of this; tp must divide it."
    )

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


class QuantConfig(_Section):
    """The quantiser of the ternary linears (BitCPM-CANN report, section 3.1)."""

    enabled: bool = Field(True, description="False trains the same model in full precision.")
    grid: Literal["ternary"] = Field("ternary", description="Levels of a quantised weight.")
    group_size: int = Field(
        -1, ge=-1, description="Inputs per scale; must divide the row; -1 is the whole row."
    )
    eps: float = Field(
        1e-5,
        ge=2.0**-126,
        description="Smallest scale, in units of the weight; a normal float32.",
    )
    scale_sync: Literal["exact", "local"] = Field(
        "exact",
        description="Row-parallel layers with group_size -1: exact = the scale of the full row, "
        "local = each shard its own (a different quantiser at each tp).",
    )
    requantize: Literal["auto", "every_step", "every_forward"] = Field(
        "auto",
        description="every_step quantises the model weights in place once after each optimizer "
        "step (needs fp32 main parameters); every_forward in each forward.",
    )
    backend: Literal["auto", "reference", "native"] = Field(
        "auto", description="Operator implementation; native fails where no kernel is built."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Glob patterns of module names that stay in full precision."
    )
    full_precision_first_layers: int = Field(
        0, ge=0, description="Leading layers (global numbers) that stay in full precision."
    )
    full_precision_last_layers: int = Field(
        0, ge=0, description="Trailing layers (global numbers) that stay in full precision."
    )


class ParallelConfig(_Section):
    """The layout over ranks; what remains of the world size is data parallel."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Ranks that share each layer.")


class DataConfig(_Section):
    """Where the tokens come from."""

    prefix: str = Field(description="Prefix of the datasets written by `bitcpm data prepare`.")
    tokenizer: str = Field(description="Tokenizer folder; must be the one used by prepare.")
    cache: str | None = Field(None, description="Folder of index caches; default beside the data.")
    seq_length: int = Field(ge=2, description="Tokens per sequence.")


class OptimizerSettings(_Section):
    """AdamW and the learning-rate schedule."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    lr_decay_style: Literal["WSD", "cosine", "constant"] = Field(
        "WSD", description="Warm-up, stable, decay; or cosine; or constant."
    )
    lr_warmup_iters: int = Field(0, ge=0, description="Steps of linear warm-up.")
    lr_wsd_decay_iters: int | None = Field(
        None, ge=1, description="WSD: length of the decay, in steps; default a fifth of the run."
    )
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] | None = Field(
        None, description="WSD: shape of the decay; default minus_sqrt."
    )
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second moment.")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    clip_grad: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")

    @property
    def wsd_decay_style(self) -> str:
        """Shape of the WSD decay, the default resolved."""
        return self.lr_wsd_decay_style or "minus_sqrt"

    def wsd_decay_iters(self, train_iters: int) -> int:
        """Return the length of the WSD decay in steps, the default resolved.

        Args:
            train_iters: optimizer steps of the run.
        """
        return self.lr_wsd_decay_iters or max(1, train_iters // 5)


class TrainConfig(_Section):
    """Length, batch, precision and intervals; intervals count optimizer steps."""

    train_iters: int = Field(ge=1, description="Optimizer steps.")
    micro_batch_size: int = Field(ge=1, description="Sequences per forward on one rank.")
    global_batch_size: int = Field(ge=1, description="Sequences per optimizer step.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16 weights with fp32 main parameters, or pure fp32."
    )
    recompute: Literal["none", "full"] = Field(
        "none", description="Recompute whole layers in the backward pass to save memory."
    )
    seed: int = Field(1234, ge=0, lt=2**32, description="Seed of initialisation and data order.")
    eval_interval: int = Field(100, ge=1, description="Steps between validations.")
    eval_iters: int = Field(10, ge=1, description="Global batches per validation.")
    log_interval: int = Field(10, ge=1, description="Steps between log lines.")
    max_skipped_steps: int = Field(
        10, ge=1, description="Stop after this many steps in a row with non-finite gradients."
    )


class CheckpointConfig(_Section):
    """Where a run writes."""

    directory: str = Field(description="Folder of the run: checkpoints, metrics, plots.")
    save_interval: int | None = Field(
        None, ge=1, description="Steps between checkpoints; default only at the end."
    )


class RunConfig(_Section):
    """A whole run. `load_config` is the way to get one."""

    model: ModelConfig
    quant: QuantConfig = QuantConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerSettings
    training: TrainConfig
    checkpoint: CheckpointConfig

    def problems(self, world_size: int = 1) -> list[str]:
        """Return every broken rule that spans fields, one line each.

        Args:
            world_size: ranks of the run.
        """
        return list(_cross_field_problems(self, world_size))

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks left for data parallelism."""
        return world_size // self.parallel.tensor_model_parallel_size

    def to_yaml(self) -> str:
        """Return the fully resolved configuration as YAML."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def _cross_field_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    model, quant, training = config.model, config.quant, config.training
    tp = config.parallel.tensor_model_parallel_size
    tp_key = "parallel.tensor_model_parallel_size"
    if world_size % tp:
        yield format_problem(
            tp_key, tp, f"does not divide the world size {world_size}",
            f"Start a multiple of {tp} ranks, or use {_divisors_text(world_size)}",
        )  # fmt: skip
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
    for name in (
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "make_vocab_size_divisible_by",
    ):
        value = getattr(model, name)
        if value % tp:
            yield format_problem(
                f"model.{name}", value, f"is not a multiple of {tp_key} {tp}",
                f"Use a multiple of {tp}, or tp {_divisors_text(value)}",
            )  # fmt: skip
    if config.data.seq_length > model.max_position_embeddings:
        yield format_problem(
            "data.seq_length", config.data.seq_length,
            f"exceeds model.max_position_embeddings {model.max_position_embeddings}",
            "Raise the latter or shorten the sequence",
        )  # fmt: skip
    dp = max(1, world_size // tp)
    if training.global_batch_size % (training.micro_batch_size * dp):
        yield format_problem(
            "training.global_batch_size", training.global_batch_size,
            f"is not a multiple of micro_batch_size {training.micro_batch_size} x dp {dp}",
            f"Use a multiple of {training.micro_batch_size * dp}",
        )  # fmt: skip
    yield from _schedule_problems(config)
    if quant.enabled:
        yield from _quant_problems(config, tp)


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


def _quant_problems(config: RunConfig, tp: int) -> Iterator[str]:
    model, quant = config.model, config.quant
    if quant.group_size == 0:
        yield format_problem("quant.group_size", 0, "is not a size", "Use -1 for the whole row")
    elif quant.group_size > 0:
        # Row-parallel layers (attention output, fc2) see only their shard of the inputs.
        rows = {
            "hidden_size": model.hidden_size,
            f"attention width / tp {tp}": model.num_attention_heads * model.head_dim // tp,
            f"ffn_hidden_size / tp {tp}": model.ffn_hidden_size // tp,
        }
        bad = {name: n for name, n in rows.items() if n % quant.group_size}
        if bad:
            shared = [g for g in range(1, 1025) if all(n % g == 0 for n in rows.values())]
            near = sorted(shared, key=lambda g: abs(g - quant.group_size))[:3]
            yield format_problem(
                "quant.group_size", quant.group_size,
                "does not divide " + ", ".join(f"{n} ({name})" for name, n in bad.items()),
                f"Use {', '.join(map(str, sorted(near)))} or -1",
            )  # fmt: skip
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


def load_config(
    path: str | Path, overrides: list[str] | None = None, world_size: int = 1
) -> RunConfig:
    """Read a run's YAML file and check it.

    Args:
        path: YAML file.
        overrides: ``section.key=value`` strings; the value is parsed as YAML.
        world_size: ranks of the run, for the rules that concern the layout.

    Raises:
        ConfigError: every problem found, one line each.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            format_problem("--config", path, reason, "Name a YAML file, see launch/configs")
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            format_problem("--config", path, "is not UTF-8 text", "Name a YAML file")
        ) from error
    return parse_config(text, overrides, world_size, source=str(path))


def parse_config(
    text: str,
    overrides: list[str] | None = None,
    world_size: int = 1,
    source: str = "configuration",
) -> RunConfig:
    """Like `load_config`, from the YAML text itself."""
    try:
        tree = yaml.safe_load(text)
    # ValueError: a date that is none, or an integer of thousands of digits.
    except (yaml.YAMLError, ValueError) as error:
        where = _one_line(error)
        raise ConfigError(format_problem("--config", source, where, "Correct the YAML")) from error
    if not isinstance(tree, dict):
        raise ConfigError(
            format_problem("--config", source, "is not a YAML mapping", "See launch/configs")
        )
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()]) from error
    problems = config.problems(world_size)
    if problems:
        raise ConfigError(problems)
    return config


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    override = _one_line(override)
    if not equals or not key:
        raise ConfigError(
            format_problem("--set", override, "is not key=value", "Write --set a.b=1")
        )
    *sections, name = key.strip().split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(
                format_problem("--set", override, f"{section} is not a section", "Check the key")
            )
        node = child
    try:
        node[name] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            format_problem("--set", override, "the value is not YAML", "Quote it")
        ) from error


def _explain(error: Any) -> str:
    """One line for one pydantic error; an unknown key names the nearest known one."""
    path = [_one_line(part) for part in error["loc"]]
    field = ".".join(path)
    value = _one_line(error["input"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        fix = f"Did you mean {near[0]}" if near else f"Known keys: {', '.join(known)}"
        return format_problem(field, value, "unknown key", fix)
    if error["type"] == "missing":
        return format_problem(field, "(absent)", "is required", "Add the key")
    rule = error["msg"].replace("Input should be", "must be").rstrip(".")
    return format_problem(field, value, rule, "Correct the value")


def _one_line(value: Any) -> str:
    """Return a value of the user as text without line breaks."""
    return " ".join(str(value).split())


def _known_keys(path: list[str]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in path:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
