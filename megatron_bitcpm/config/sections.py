"""The sections of a run's YAML file and the ranges of their fields."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.arch.model import ModelConfig
from megatron_bitcpm.quant.grids import GRIDS
from megatron_bitcpm.quant.settings import parse_group_size
from megatron_bitcpm.records import Section

_LEVELS = ", ".join(
    " ".join([grid.name, *(f"{level:g}" for level in grid.levels)]) for grid in GRIDS.values()
)


class QuantConfig(Section):
    """The quantiser of the ternary linears (BitCPM-CANN report, section 3.1)."""

    enabled: bool = Field(True, description="False trains the same model in full precision.")
    grid: str = Field(
        "ternary",
        json_schema_extra={"enum": list(GRIDS)},
        description=f"Levels of a quantised weight, in units of its scale: {_LEVELS}. The scale of "
        "ternary is a mean of absolute values, that of the others follows the largest one "
        "(BitCPM-CANN report, section 3.1).",
    )
    group_size: Annotated[int, Field(ge=-1)] | Literal["tensor"] = Field(
        -1,
        description="Inputs per scale; must divide the row; -1 is the whole row, tensor a whole "
        "Hugging Face projection (q, k, v, o, gate, up or down), as in BitNet b1.58.",
    )
    activation: Literal["none", "int8_per_token"] = Field(
        "none",
        description="What enters a ternary linear: its input as it is, or each token of it on the "
        "int8 grid with the scale absmax / 127 (BitNet b1.58). Under row parallelism a rank sees "
        "its slice of the token, so that the scale depends on tp.",
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

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, value: str) -> str:
        if value not in GRIDS:
            known = ", ".join(GRIDS)
            raise PydanticCustomError("grid", f"must be one of {known}")
        return value

    @field_validator("group_size", mode="before")
    @classmethod
    def _check_group_size(cls, value: Any) -> int | str:
        """Give one problem for the field, not one for each type it may have."""
        try:
            return parse_group_size(value)
        except ValueError as error:
            raise PydanticCustomError("group_size", str(error)) from None

    def excludes(self, name: str, layer: int, num_layers: int) -> bool:
        """Whether a linear stays in full precision by its name or place, in training and exports.

        `name` is global, for example ``decoder.layers.3.mlp.linear_fc2``; so is `layer`, from 0.
        """
        first, last = self.full_precision_first_layers, self.full_precision_last_layers
        if layer < first or layer >= num_layers - last:
            return True
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)


class ParallelConfig(Section):
    """The layout over ranks; what remains of the world size is data parallel."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Ranks that share each layer.")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="Stages of consecutive layers.")
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=2, description="Chunks of layers on each stage (interleaved schedule)."
    )
    context_parallel_size: int = Field(
        1, ge=1, description="Ranks that share each sequence; keys and values are gathered."
    )
    sequence_parallel: bool = Field(
        False, description="Shard norms and residuals along the sequence over the tensor ranks."
    )
    use_distributed_optimizer: bool = Field(
        False, description="Shard main parameters and moments over the data-parallel ranks."
    )
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients while the backward pass runs."
    )
    overlap_param_gather: bool = Field(
        False, description="Gather parameters while the forward pass runs (distributed optimizer)."
    )
    ddp_bucket_size: int | None = Field(
        None, ge=1, description="Parameters in one communication bucket; default Megatron's."
    )

    @property
    def layout(self) -> Layout:
        """The sizes of the groups."""
        return Layout(
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.virtual_pipeline_model_parallel_size or 1,
            self.context_parallel_size,
        )


class BlendEntry(Section):
    """One dataset of a blend."""

    prefix: str = Field(description="Prefix written by `bitcpm data prepare`.")
    weight: float = Field(gt=0, description="Share of the samples, in any unit.")


class DataConfig(Section):
    """Where the tokens come from."""

    prefix: str | None = Field(
        None, description="Prefix of the dataset written by `bitcpm data prepare`."
    )
    blend: tuple[BlendEntry, ...] = Field(
        (), description="Several datasets with weights, instead of prefix."
    )
    valid: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], str] = Field(
        {},
        description="Validation sets, name -> prefix (its valid split); default those of the "
        "training data.",
    )
    tokenizer: str = Field(description="Tokenizer folder; must be the one used by prepare.")
    cache: str | None = Field(None, description="Folder of index caches; default beside the data.")
    seq_length: int = Field(ge=2, description="Tokens per sequence.")
    reset_attention_mask: bool = Field(
        False, description="Tokens attend only within their document."
    )
    reset_position_ids: bool = Field(False, description="Positions start anew at each document.")
    eod_mask_loss: bool = Field(
        False, description="Leave out of the loss what is predicted at end-of-document tokens."
    )

    @property
    def train_sets(self) -> tuple[BlendEntry, ...]:
        """The training datasets, a single one with weight 1."""
        return self.blend or (BlendEntry(prefix=str(self.prefix), weight=1.0),)

    @property
    def valid_sets(self) -> dict[str, str]:
        """The validation sets, name -> prefix, the default resolved."""
        if self.valid:
            return dict(self.valid)
        if not self.blend:
            return {"valid": str(self.prefix)}
        return {Path(entry.prefix).name: entry.prefix for entry in self.blend}


class OptimizerSettings(Section):
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
    initial_loss_scale: float | None = Field(
        None,
        gt=0,
        description="fp16: the first dynamic scale of the loss, which is a sum over the tokens of "
        "a micro-batch; default 65536 / those tokens.",
    )

    @property
    def wsd_decay_style(self) -> str:
        """Shape of the WSD decay, the default resolved."""
        return self.lr_wsd_decay_style or "minus_sqrt"

    def wsd_decay_iters(self, train_iters: int) -> int:
        """Return the length of the WSD decay in steps, the default resolved."""
        return self.lr_wsd_decay_iters or max(1, train_iters // 5)


class TrainConfig(Section):
    """Length, batch, precision and intervals; intervals count optimizer steps."""

    train_iters: int = Field(ge=1, description="Optimizer steps.")
    micro_batch_size: int = Field(ge=1, description="Sequences per forward on one rank.")
    global_batch_size: int = Field(ge=1, description="Sequences per optimizer step.")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16",
        description="bf16 or fp16 weights with fp32 main parameters, or pure fp32; fp16 has a "
        "dynamic loss scale.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="What the backward pass recomputes to save memory: nothing, the attention "
        "scores, or whole layers.",
    )
    seed: int = Field(1234, ge=0, lt=2**32, description="Seed of initialisation and data order.")
    eval_interval: int = Field(100, ge=1, description="Steps between validations.")
    eval_iters: int = Field(10, ge=1, description="Global batches per validation.")
    log_interval: int = Field(10, ge=1, description="Steps between log lines.")
    exit_duration_in_mins: float | None = Field(
        None, gt=0, description="Save and exit at the first step after this many minutes."
    )


class GuardConfig(Section):
    """When a run counts as gone wrong, and what happens then."""

    action: Literal["stop", "rollback"] = Field(
        "stop",
        description="stop, or return to the newest checkpoint and go on with later data.",
    )
    max_skipped_steps: int = Field(
        10,
        ge=1,
        description="Act after this many steps in a row with a non-finite loss or gradient.",
    )
    loss_spike_threshold: float | None = Field(
        None,
        gt=0,
        description="A spike is a loss this many nats above the median of the window; default off.",
    )
    loss_spike_window: int = Field(
        64, ge=2, description="Losses in the window; no spike is seen before it is full."
    )
    max_spikes: int = Field(3, ge=1, description="Act after this many spikes in a row.")
    max_rollbacks: int = Field(2, ge=1, description="Stop instead of one more rollback than this.")


class CheckpointConfig(Section):
    """Where a run writes, what it keeps, and what it starts from."""

    directory: str = Field(description="Folder of the run: checkpoints, metrics, plots.")
    save_interval: int | None = Field(
        None, ge=1, description="Steps between checkpoints; default only at the end."
    )
    keep_last_n: int | None = Field(
        None, ge=1, description="Delete all but this many newest checkpoints; default keep all."
    )
    keep_every_n: int | None = Field(
        None, ge=1, description="... but never those whose step is a multiple of this."
    )
    async_save: bool = Field(
        False, description="Write checkpoints in the background while training goes on."
    )
    init_from: str | None = Field(
        None,
        description="Begin with the latent weights of this checkpoint or run (ternary or full "
        "precision, any layout); optimizer, step and data are fresh.",
    )


class RunConfig(Section):
    """A whole run. `load_config` is the way to get one."""

    model: ModelConfig
    quant: QuantConfig = QuantConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerSettings
    training: TrainConfig
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig

    def to_yaml(self) -> str:
        """Return the fully resolved configuration as YAML."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
