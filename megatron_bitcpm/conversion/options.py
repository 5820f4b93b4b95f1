"""What `convert` and `qat_convert` are told, checked once, and what an input can become.

An output has a format, hf (a Hugging Face folder), torch_dist or legacy (Megatron), and a form, see
`arch.model.Form`. What an input can become stands in `REFUSALS`, which docs/conversion.md prints.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_bitcpm.arch.layout import Layout
from megatron_bitcpm.arch.model import Form
from megatron_bitcpm.arch.tensors import FAMILIES
from megatron_bitcpm.config import QuantConfig
from megatron_bitcpm.conversion.difference import markdown_table
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quant.grids import GRIDS
from megatron_bitcpm.quant.settings import DEFAULT_EPS, FP32, NUMERICS, parse_group_size
from megatron_bitcpm.records import Record, explain

if TYPE_CHECKING:  # the command line, which is made of these, must be there at once
    from megatron_bitcpm.conversion.source import TensorSource
    from megatron_bitcpm.quantizer import Quantizer

Format = Literal["hf", "torch_dist", "legacy"]
MEGATRON = ("torch_dist", "legacy")
MAX_SHARD_BYTES = 5_000_000_000

_PLAIN = "plain, --quant-type"
_FOLDED = "latent, --architecture llama"
INPUTS = ("latent", _FOLDED, "pseudo", "plain", _PLAIN)
OUTPUTS = ("hf latent", "hf pseudo", "hf plain", "Megatron")
_LATENT_TO_PLAIN = "a plain folder would not name the quantiser of a latent model"
REFUSALS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("latent", "hf plain"): ("form", _LATENT_TO_PLAIN, "Use --form pseudo or --form latent"),
    (_FOLDED, "hf latent"): (
        "architecture",
        "latent weights are not folded, as training would continue with other step sizes",
        "Use --form pseudo, or --architecture minicpm",
    ),
    (_FOLDED, "hf plain"): ("form", _LATENT_TO_PLAIN, "Use --form pseudo"),
    (_FOLDED, "Megatron"): (
        "architecture",
        "a Megatron checkpoint keeps the constants of a MiniCPM",
        "Leave it out",
    ),
    ("pseudo", "hf latent"): (
        "form",
        "a pseudo-quantised model has lost its latent weights",
        "Convert the checkpoint or the latent folder that it was made from",
    ),
    ("pseudo", "hf plain"): (
        "form",
        "a plain folder would not name the quantiser of a pseudo-quantised model",
        "Use --form pseudo",
    ),
    ("plain", "hf latent"): (
        "form",
        "the input does not say which quantiser trained it",
        "Name it with --quant-type and --group-size, or use --form plain",
    ),
    (_PLAIN, "hf plain"): (
        "quant_type",
        "a quantiser has no effect on weights that are stored as they are",
        "Leave it out, or use --form latent or --form pseudo",
    ),
}
REFUSALS["plain", "hf pseudo"] = REFUSALS["plain", "hf latent"]
REFUSALS[_PLAIN, "Megatron"] = (
    *REFUSALS[_PLAIN, "hf plain"][:2],
    "Leave it out, or use --format hf with --form latent or --form pseudo",
)
"""(input, output) -> the option, its rule and the fix; every other pair is possible."""


def describe_conversions() -> str:
    """Return the table of what an input can become, as Markdown."""
    rows = []
    for given in INPUTS:
        refused = (REFUSALS.get((given, output)) for output in OUTPUTS)
        rows.append((given, *("yes" if r is None else f"refused: {r[1]}" for r in refused)))
    return markdown_table(("input", *OUTPUTS), rows)


def _to_path(value: object) -> Path:
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return Path(value)
    raise ValueError("must be a path")


def _to_group_size(value: object) -> object:
    return None if value is None else parse_group_size(value)


def _to_bytes(value: object) -> int:
    """Return bytes: of a number, or of a text such as ``5GB`` (10^9) or ``5GiB`` (2^30)."""
    size = 0
    if isinstance(value, str) or type(value) is int:
        with contextlib.suppress(ValidationError, OverflowError):
            size = int(_BYTES.validate_python(value))
    if not 1 <= size < 2**63:
        raise ValueError("must be the size of a file, for example 5GB or 500MB")
    return size


PathOption = Annotated[Path, BeforeValidator(_to_path)]
_Size = Annotated[int, Field(ge=1)]
_BYTES = TypeAdapter(ByteSize)
R = TypeVar("R", bound="Options")


class Options(Record):
    """Base of a command's options; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def read(cls: type[R], **given: Any) -> R:
        """Check options; raise a CheckpointError with the first that is wrong, and its rule."""
        try:
            options = cls.model_validate(given)
        except ValidationError as error:
            raise CheckpointError(f"{explain(error)}. Correct the option.") from error
        options.check()
        return options

    def check(self) -> None:
        """Refuse options that do not go together."""


class QuantizerOptions(Options):
    """The quantiser that trained unstamped latents; None: the stamp's, or the default."""

    quant_type: Literal[tuple(GRIDS)] | None = Field(  # type: ignore[valid-type]
        None, description="Grid that trained unstamped latents, for example ternary."
    )
    group_size: Annotated[int | str | None, BeforeValidator(_to_group_size)] = Field(
        None, description="... its inputs per scale; -1 is the row, or tensor."
    )
    eps: float | None = Field(None, description="... its smallest scale; default 1e-5.")
    numerics: Literal[NUMERICS] | None = Field(  # type: ignore[valid-type]
        None, description="... its arithmetic: fp32 (default) or bf16_reciprocal."
    )

    def check(self) -> None:
        """Refuse an arithmetic that the grid does not have, and a scale that does not exist."""
        from megatron_bitcpm.quant.scales import check_eps
        from megatron_bitcpm.quantizer import Quantizer

        if self.quant_type is not None:
            Quantizer(QuantConfig(grid=self.quant_type), 1, self.numerics or FP32).check_numerics()
        if self.eps is not None:
            check_eps(self.eps)

    def given(self) -> dict[str, Any]:
        """Return the settings that were named."""
        named = ("quant_type", "group_size", "numerics", "eps")
        return {name: value for name in named if (value := getattr(self, name)) is not None}

    def quantizer(self) -> Quantizer:
        """Return the quantiser of an unstamped model; its grid and group size must be named."""
        for name in ("quant_type", "group_size"):
            if getattr(self, name) is None:
                raise CheckpointError(
                    f"{name}=None: must be named with the other settings of the quantiser. Use "
                    "the one of the training, for example --quant-type ternary --group-size -1."
                )
        from megatron_bitcpm.quantizer import Quantizer

        eps = DEFAULT_EPS if self.eps is None else self.eps
        content: dict[str, Any] = {"grid": self.quant_type, "group_size": self.group_size}
        return Quantizer(QuantConfig(**content, eps=eps), 1, self.numerics or FP32)

    def check_agrees(self, quantizer: Quantizer) -> None:
        """Refuse settings that contradict the stamp."""
        config = quantizer.config
        stamped = {
            "quant_type": config.grid,
            "group_size": config.group_size,
            "numerics": quantizer.numerics,
            "eps": config.eps,
        }
        for name, value in self.given().items():
            if value != stamped[name]:
                raise CheckpointError(
                    f"{name}={value}: the model was trained with {stamped[name]}, says its stamp. "
                    f"Use {stamped[name]}."
                )


class ConvertOptions(QuantizerOptions):
    """Options of `convert`; the command line is made of them."""

    input: PathOption = Field(description="Hugging Face folder, Megatron checkpoint, or run.")
    output: PathOption = Field(
        description="Folder to write; of a Megatron format the folder above release."
    )
    format: Format = Field("hf", description="hf (default), torch_dist or legacy.")
    form: Form | None = Field(
        None,
        description="latent, pseudo or plain; default pseudo for a quantised model in hf, "
        "otherwise that of the input.",
    )
    tensor_parallel_size: _Size = Field(1, description="Megatron: shards of each layer; default 1.")
    pipeline_parallel_size: _Size = Field(1, description="Megatron: pipeline stages; default 1.")
    virtual_pipeline_parallel_size: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Megatron: chunks on each stage (interleaved)."
    )
    transformer_impl: Literal["local", "transformer_engine"] = Field(
        "local", description="legacy: names of the norms; local (default) or transformer_engine."
    )
    architecture: Literal[tuple(FAMILIES)] | None = Field(  # type: ignore[valid-type]
        None, description="hf, of a MiniCPM: minicpm (default) or llama, which folds its constants."
    )
    tokenizer: PathOption | None = Field(
        None, description="Tokenizer folder, where the input has none."
    )
    max_shard_size: Annotated[int, BeforeValidator(_to_bytes)] = Field(
        MAX_SHARD_BYTES, description="hf: largest weight file, default 5GB."
    )
    weights: Literal["safetensors", "bin"] = Field(
        "safetensors", description="hf: safetensors (default) or bin."
    )
    force: bool = Field(False, description="Convert weights that look untrained on that grid.")
    overwrite: bool = Field(False, description="Replace the output, if it is a model.")
    to: Literal["torch_dist", "legacy", "plain", "latent", "pseudo"] | None = Field(
        None, description="Old name of --format and --form; removed in the next release."
    )

    @property
    def layout(self) -> Layout:
        """Shards of a Megatron format."""
        vpp = self.virtual_pipeline_parallel_size or 1
        return Layout(self.tensor_parallel_size, self.pipeline_parallel_size, vpp)

    @classmethod
    def read(cls: type[R], **given: Any) -> R:
        """Check options, of which `to` stands for `format` or `form`; see `Options.read`."""
        to = given.get("to")
        if to is not None:
            if given.get("format") is not None or given.get("form") is not None:
                raise CheckpointError(
                    f"to={to}: is the old name of format and form. Use only those."
                )
            given |= {"format": to} if to in MEGATRON else {}
            given |= {"form": to} if to in get_args(Form) else {}
        return super().read(**given)

    def check(self) -> None:
        """Refuse options that have no effect on the format."""
        super().check()
        hf_only = ("max_shard_size", "weights", "force")
        sizes = (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "virtual_pipeline_parallel_size",
        )
        idle = hf_only if self.format in MEGATRON else sizes
        for name in (*idle, *(() if self.format == "legacy" else ("transformer_impl",))):
            value = getattr(self, name)
            if name in self.model_fields_set and value not in (None, False):
                raise CheckpointError(
                    f"{name}={value}: has no effect on format {self.format}. Leave it out, or use "
                    "another format."
                )

    def warnings(self) -> list[str]:
        """Return the line that names the new options for an old one."""
        if self.to is None:
            return []
        new = f"--format {self.to}" if self.to in MEGATRON else f"--form {self.to}"
        return [f"--to {self.to} is now {new}; --to is removed in the next release"]


def choose_form(options: ConvertOptions, source: TensorSource, folds: bool) -> Form:
    """Return the form of the output; `folds` says that a MiniCPM's constants go into its weights.

    Raises:
        CheckpointError: the input cannot become that; an option that has no effect on it.
    """
    is_megatron = options.format in MEGATRON
    named = options.given() if source.quantizer is None else {}
    form = options.form
    if form is None:
        form = source.form if is_megatron or (source.form == "plain" and not named) else "pseudo"
    if is_megatron and form != source.form:
        raise CheckpointError(
            f"form={form}: a Megatron checkpoint keeps the form of its input, which is "
            f"{source.form} ({source.path}). Leave it out."
        )
    if source.quantizer is not None:
        options.check_agrees(source.quantizer)
    given: str = _PLAIN if named else source.form
    folds_latents = folds and (bool(named) or source.form == "latent")
    if options.architecture is not None if is_megatron else folds_latents:
        given = _FOLDED
    if refusal := REFUSALS.get((given, "Megatron" if is_megatron else f"hf {form}")):
        option, rule, fix = refusal
        asked = {"form": form, "architecture": options.architecture, **named}
        if option not in asked:
            option = next(iter(named))  # the first that was named of the quantiser
        raise CheckpointError(f"{option}={asked[option]}: {rule} ({source.path}). {fix}.")
    if options.force and not named:
        raise CheckpointError(
            "force=True: has no effect: only latents whose quantiser is named are looked at. Leave "
            "it out."
        )
    return form
