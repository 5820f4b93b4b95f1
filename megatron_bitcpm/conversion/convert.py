"""Conversion between any two formats: open, check the wish, write, prove.

    input                          to
    torch_dist, legacy, hf   ->    torch_dist, legacy        the stored tensors, in another layout
                             ->    plain, latent, pseudo     a Hugging Face folder in that form

What a wish can mean follows from the form of the input (see `source`): a latent model can be
written latent or pseudo-quantised, a pseudo-quantised one only as such, because its latent weights
are gone, and a plain one as such, or, when the quantiser that trained it is named, in the other
two forms.
Every output is compared with its input, tensor by tensor, before it gets its name.
"""

from __future__ import annotations

import os
import re
import reprlib
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

from megatron_bitcpm.conversion.hf.writer import MAX_SHARD_BYTES, write_folder
from megatron_bitcpm.conversion.megatron.legacy_writer import write_legacy
from megatron_bitcpm.conversion.megatron.shards import MegatronLayout
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.quantizer_settings import (
    QuantizerSettings,
    parse_quantizer_settings,
)
from megatron_bitcpm.conversion.source import Form, ModelSource
from megatron_bitcpm.conversion.stamp import QuantizerStamp
from megatron_bitcpm.conversion.verify import verify_written
from megatron_bitcpm.errors import CheckpointError

Target = Literal["torch_dist", "legacy", "plain", "latent", "pseudo"]
TARGETS: tuple[Target, ...] = get_args(Target)
MEGATRON_TARGETS = ("torch_dist", "legacy")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LARGEST_FILE = 2**63 - 1


def convert(
    input: str | Path,
    output: str | Path,
    to: str,
    *,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
    virtual_pipeline_parallel_size: int | None = None,
    transformer_impl: str | None = None,
    architecture: str | None = None,
    tokenizer: str | Path | None = None,
    quant_type: str | None = None,
    group_size: int | str | None = None,
    eps: float | None = None,
    numerics: str | None = None,
    max_shard_size: int | str | None = None,
    weights: str | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model in another format, and verify it against the input.

    Args:
        input: a Hugging Face folder, a Megatron checkpoint of either format, or a run's folder.
        output: folder to write; of a Megatron target the folder above ``iter_*``.
        to: one of `TARGETS`.
        tensor_parallel_size, pipeline_parallel_size: shards of a Megatron target; default 1.
        virtual_pipeline_parallel_size: chunks of layers on each stage; default none.
        transformer_impl: of the runs that will load legacy shards: local (default) or
            transformer_engine; decides the names of the norms.
        architecture: of a MiniCPM's Hugging Face folder: minicpm (default) or llama, which folds
            its constants into the weights.
        tokenizer: tokenizer folder of an input that has none of its own.
        quant_type, group_size, eps, numerics: the quantiser that trained an unstamped latent model.
        max_shard_size: largest weight file of a Hugging Face folder, bytes or for example ``5GB``.
        weights: of a Hugging Face folder: safetensors (default) or bin.
        force: go on although the latent weights look as if they had never been trained quantised;
            of unstamped ones, whose quantiser is named.
        overwrite: replace `output`, if it holds a model.
    Returns:
        What was read and written, seconds, and the report of the verification, as JSON.

    Raises:
        CheckpointError: bad input or wish, a full disk, or an output that differs; nothing is left
            behind, and an old output is as it was.
    """
    _check_types(locals())
    target = _check_target(to)
    layout_sizes = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "virtual_pipeline_parallel_size": virtual_pipeline_parallel_size,
    }
    folder_settings = {
        "architecture": architecture,
        "max_shard_size": max_shard_size,
        "weights": weights,
        "force": force or None,
    }
    quantizer = parse_quantizer_settings(quant_type, group_size, numerics, eps)
    megatron = target in MEGATRON_TARGETS
    names = {"transformer_impl": None if target == "legacy" else transformer_impl}
    _refuse_without_effect({**(folder_settings if megatron else layout_sizes), **names}, target)
    _check_layout(layout_sizes)
    input, output = _check_paths(input, output)
    source = open_source(input, tokenizer)
    _check_tokenizer_wanted(source, tokenizer)
    _check_form(source, target, quantizer)
    stamp = _check_quantizer(source, quantizer, target, force)
    if megatron:
        sizes = [1 if size is None else size for size in layout_sizes.values()]
        written = _write_megatron(
            source, output, target, MegatronLayout(*sizes), overwrite, transformer_impl
        )
    else:
        _check_architecture(source, target, architecture)
        written = write_folder(
            source,
            output,
            cast(Form, target),
            architecture=architecture,
            weights=_check_weights(weights),
            max_shard_bytes=parse_size(max_shard_size),
            overwrite=overwrite,
            stamp=stamp,
            force=force,
            tokenizer=tokenizer,
        )
    return {
        "input": str(source.path),
        "input_kind": source.kind,
        "input_form": source.form,
        "output": str(output),
        "to": target,
        "tensors": len(source.shapes()),
        **written,
    }


def _write_megatron(
    source: ModelSource,
    output: Path,
    target: Target,
    layout: MegatronLayout,
    overwrite: bool,
    transformer_impl: str | None,
) -> dict[str, Any]:
    """Write a checkpoint; the writer calls the comparison before it publishes."""

    def check(folder: Path) -> dict[str, Any]:
        return verify_written(folder, source, output)

    if target == "torch_dist":
        written = write_torch_dist(source, output, layout, overwrite=overwrite, check=check)
    else:
        names = {} if transformer_impl is None else {"transformer_impl": transformer_impl}
        written = write_legacy(source, output, layout, overwrite=overwrite, check=check, **names)
    return {**written, "padding_rows": written["padded_vocab_size"] - source.vocab_size}


def parse_size(size: int | str | None) -> int:
    """Return bytes: of a number, or of a text such as ``5GB`` (10^9) or ``5GiB`` (2^30).

    Raises:
        CheckpointError: it is no size, or not positive.
    """
    if size is None:
        return MAX_SHARD_BYTES
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]i?B)?", str(size), re.IGNORECASE)
    value = int(Decimal(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if not 1 <= value <= _LARGEST_FILE:
        raise CheckpointError(
            f"max_shard_size={str(size)[:40]}: is no size of a file. Use for example 5GB or 500MB."
        )
    return value


def _check_types(arguments: dict[str, Any]) -> None:
    """Refuse arguments of `convert` that are not what its annotations say, and paths of nothing."""
    hints = get_type_hints(convert)
    for name, value in arguments.items():
        types = get_args(hints[name]) or (hints[name],)
        # To Python a truth value is an integer, and an integer is no float.
        known = type(value) in types or (type(value) is int and float in types)
        rule = None
        if not known and (isinstance(value, bool) or not isinstance(value, types)):
            names = ("None" if kind is type(None) else kind.__name__ for kind in types)
            rule = f"is of type {type(value).__name__}, takes {' or '.join(names)}"
        elif Path in types and value == "":
            rule = "is no path"
        elif Path in types and "\0" in str(value):
            rule = "holds a null character, which no path can"
        if rule is not None:
            raise CheckpointError(f"{name}={reprlib.repr(value)}: {rule}. Change it.")


def _check_target(to: str) -> Target:
    for target in TARGETS:
        if to == target:
            return target
    raise CheckpointError(f"to={to}: is no format. Use {', '.join(TARGETS)}.")


def _refuse_without_effect(settings: dict[str, Any], target: Target) -> None:
    """Refuse settings that the target does not have."""
    for name, value in settings.items():
        if value is not None:
            raise CheckpointError(
                f"{name}={value}: has no effect on to={target}. Leave it out, or use another "
                "format."
            )


def _check_layout(sizes: dict[str, int | None]) -> None:
    if sizes["virtual_pipeline_parallel_size"] == 1:
        raise CheckpointError("virtual_pipeline_parallel_size=1: is no interleaving. Leave it out.")


def _check_paths(input: str | Path, output: str | Path) -> tuple[Path, Path]:
    """Refuse an output that the input is part of, or that would become part of the input."""
    real_input, real_output = Path(os.path.realpath(input)), Path(os.path.realpath(output))
    # A single weights file stands for its folder.
    folder = real_input.parent if real_input.is_file() else real_input
    for inner, outer, word in (
        (real_output, folder, "lies in the input"),
        (folder, real_output, "holds the input"),
    ):
        if inner == outer or outer in inner.parents:
            rule = "is the input" if inner == outer else word
            raise CheckpointError(f"output={output}: {rule}. Name another folder.")
    return Path(input), real_output


def _check_tokenizer_wanted(source: ModelSource, tokenizer: str | Path | None) -> None:
    if tokenizer is not None and source.kind == "hf":
        raise CheckpointError(
            f"tokenizer={tokenizer}: has no effect: {source.path} is a Hugging Face folder. Leave "
            "it out; a folder without a tokenizer needs the files in it."
        )


def _check_form(source: ModelSource, target: Target, quantizer: QuantizerSettings) -> None:
    """Refuse what the form of the input cannot become."""
    given = quantizer.given()
    rule = fix = None
    if source.form == "pseudo" and target == "latent":
        rule = "a pseudo-quantised model has lost its latent weights"
        fix = "Convert the checkpoint or the latent folder that it was made from"
    elif source.form != "plain" and target == "plain":
        rule = f"the input is a {source.form} model, and a plain folder would not say its quantiser"
        fix = "Use --to pseudo" + (" or --to latent" if source.form == "latent" else "")
    elif source.form == "plain" and target in ("latent", "pseudo") and not given:
        rule = "the input does not say which quantiser trained it"
        fix = "Name it with --quant-type and --group-size, or use --to plain"
    if rule is not None and fix is not None:
        raise CheckpointError(f"to={target}: {rule} ({source.path}). {fix}.")


def _check_quantizer(
    source: ModelSource, quantizer: QuantizerSettings, target: Target, force: bool
) -> QuantizerStamp | None:
    """Return the quantiser named for an unstamped model; refuse one, and force, without effect."""
    given = quantizer.given()
    if source.stamp is not None:
        quantizer.check_agrees(source.stamp)
    if force and (source.stamp is not None or not given):
        raise CheckpointError(
            f"force={force}: has no effect: only latents whose quantiser is named are looked at. "
            "Leave it out."
        )
    if source.stamp is not None or not given:
        return None
    if target not in ("latent", "pseudo"):
        _refuse_quantizer(given, target)
    return quantizer.make_stamp()


def _refuse_quantizer(given: dict[str, Any], target: Target) -> None:
    name, value = next(iter(given.items()))
    raise CheckpointError(
        f"{name}={value}: has no effect on to={target}, which stores the weights as they are. "
        "Leave it out, or use --to latent or --to pseudo."
    )


def _check_architecture(source: ModelSource, target: Target, architecture: str | None) -> None:
    if architecture is None:
        return
    if architecture not in ("llama", "minicpm"):
        raise CheckpointError(f"architecture={architecture}: is unknown. Use llama or minicpm.")
    rule, fix = None, "Leave it out"
    if source.model.architecture != "minicpm":
        rule = "has an effect on a MiniCPM only, and the input is a Llama"
        if source.folding is not None:
            rule = "the input is a folded MiniCPM, and folding cannot be undone"
    elif architecture == "llama" and target == "latent":
        rule = "latent weights are not folded: training would go on with other step sizes"
        fix = "Use --to pseudo, or --architecture minicpm"
    if rule is not None:
        raise CheckpointError(f"architecture={architecture}: {rule}. {fix}.")


def _check_weights(weights: str | None) -> str:
    if weights not in (None, "safetensors", "bin"):
        raise CheckpointError(f"weights={weights}: is unknown. Use safetensors or bin.")
    return weights or "safetensors"
