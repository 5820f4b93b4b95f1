"""The sections of a run's YAML file and the ranges of their fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import PydanticCustomError


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    def changed(self, *names: str) -> list[str]:
        """Return those of the named fields that differ from their defaults.

        A saved configuration spells out every default, so that a field was given says nothing.
        """
        return [n for n in names if getattr(self, n) != type(self).model_fields[n].default]

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``true`` where a number belongs: pydantic would read it as 1."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if not {int, float}.isdisjoint({annotation, *get_args(annotation)}):
                raise PydanticCustomError("bool_for_number", "must be a number, not true or false")
        return value


_Factor = Annotated[float, Field(gt=0)]


class RopeScalingConfig(_Section):
    """LongRoPE: one divisor for each rotary frequency, of short and of long sequences.

    The arrays are those of a released model: name its Hugging Face ``config.json`` in `hf_config`
    and `load_config` copies them; the resolved configuration holds them, with their source.
    """

    rope_type: Literal["longrope"] = Field("longrope", description="Kind of scaling.")
    hf_config: str | None = Field(
        None, description="A Hugging Face config.json to read all other fields from."
    )
    source: str | None = Field(None, description="Where the factors were read from; a note.")
    short_factor: tuple[_Factor, ...] = Field(
        (), description="Divisors for sequences up to the original length; head_dim / 2 numbers."
    )
    long_factor: tuple[_Factor, ...] = Field(
        (), description="Divisors for longer sequences; head_dim / 2 numbers."
    )
    original_max_position_embeddings: int | None = Field(
        None, ge=2, description="Length up to which short_factor applies, in tokens."
    )
    attention_factor: float | None = Field(
        None,
        gt=0,
        description="Multiplies cos and sin; default sqrt(1 + ln(max / original) / ln(original)).",
    )


class ModelConfig(_Section):
    """The architecture: a Llama decoder (RMSNorm, SwiGLU, RoPE, grouped queries), or MiniCPM.

    MiniCPM is Llama with three constants (muP); they are carried in training, never folded.
    """

    architecture: Literal["llama", "minicpm"] = Field("llama", description="Model family.")
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
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="LongRoPE; default plain RoPE."
    )
    scale_emb: float | None = Field(
        None, gt=0, description="MiniCPM: the embedding is multiplied by this."
    )
    scale_depth: float | None = Field(
        None, gt=0, description="MiniCPM: residuals are multiplied by this / sqrt(num_layers)."
    )
    dim_model_base: int | None = Field(
        None, ge=1, description="MiniCPM: logits are divided by hidden_size / this."
    )
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
    grid: Literal["ternary", "asym4", "half_sym4", "int_sym4", "five"] = Field(
        "ternary",
        description="Levels of a quantised weight, in units of its scale: ternary -1 0 1, asym4 "
        "-2 -1 0 1, half_sym4 -1.5 -0.5 0.5 1.5, int_sym4 -2 -1 1 2, five -2 -1 0 1 2. The scale "
        "of ternary is a mean of absolute values, that of the others follows the largest one "
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

    @field_validator("group_size", mode="wrap")
    @classmethod
    def _check_group_size(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """Give one problem for the field, not one for each type it may have."""
        try:
            if not isinstance(value, bool):
                return handler(value)
        except ValidationError:
            pass
        raise PydanticCustomError("group_size", "must be a whole number of at least -1, or tensor")


class ParallelConfig(_Section):
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
    def model_parallel_size(self) -> int:
        """Ranks that together hold one replica of the model and one sequence."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def pipeline_chunks(self) -> int:
        """Pieces that the layers are cut into: stages x chunks on a stage."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)


class BlendEntry(_Section):
    """One dataset of a blend."""

    prefix: str = Field(description="Prefix written by `bitcpm data prepare`.")
    weight: float = Field(gt=0, description="Share of the samples, in any unit.")


class DataConfig(_Section):
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
        None, gt=0, description="Save and exit at the first step after so many minutes."
    )


class GuardConfig(_Section):
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
        description="A spike is a loss so many nats above the median of the window; default off.",
    )
    loss_spike_window: int = Field(
        64, ge=2, description="Losses in the window; no spike is seen before it is full."
    )
    max_spikes: int = Field(3, ge=1, description="Act after this many spikes in a row.")
    max_rollbacks: int = Field(2, ge=1, description="Stop instead of one more rollback than this.")


class CheckpointConfig(_Section):
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


class RunConfig(_Section):
    """A whole run. `load_config` is the way to get one."""

    model: ModelConfig
    quant: QuantConfig = QuantConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerSettings
    training: TrainConfig
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig

    def problems(self, world_size: int = 1) -> list[str]:
        """Return every broken rule that spans fields, one line each.

        Args:
            world_size: ranks of the run.
        """
        from megatron_bitcpm.config.rules import cross_field_problems

        return list(cross_field_problems(self, world_size))

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks left for data parallelism."""
        return world_size // self.parallel.model_parallel_size

    def to_yaml(self) -> str:
        """Return the fully resolved configuration as YAML."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
