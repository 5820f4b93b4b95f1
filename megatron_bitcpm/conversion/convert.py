"""Conversion between any two formats: open, choose the form, write, prove.

Every output is compared with its input, tensor by tensor, before it gets its name.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bitcpm.conversion.hf.fold import fold
from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.conversion.megatron.legacy_writer import write_legacy
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.options import MEGATRON, ConvertOptions, choose_form
from megatron_bitcpm.conversion.quantization_error import check_latents, check_trained
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.verify import verify_written
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.quantizer import Quantizer


def convert(input: str | Path, output: str | Path, **settings: Any) -> dict[str, Any]:
    """Write a model in another format or form, and verify it against the input.

    Args:
        input: a Hugging Face folder, a Megatron checkpoint of either format, or a run's folder.
        output: folder to write; of a Megatron format the folder above ``release``.
        **settings: other fields of `ConvertOptions`, for example ``format`` and ``form``.
    Returns:
        What was read and written, seconds, and the report of the verification, as JSON.

    Raises:
        CheckpointError: bad input or options, a full disk, or an output that differs; nothing is
            left behind, and an old output is as it was.
    """
    options = ConvertOptions.read(input=input, output=output, **settings)
    target = check_places(options.input, options.output)
    source = open_source(options.input, options.tokenizer)
    if options.tokenizer is not None and source.kind == "hf":
        raise CheckpointError(
            f"tokenizer={options.tokenizer}: has no effect: {source.path} is a Hugging Face "
            "folder. Leave it out; a folder without a tokenizer needs the files in it."
        )
    folds = _folds(options, source)
    form = choose_form(options, source, folds)
    warnings = options.warnings()
    if options.format in MEGATRON:
        written = _write_megatron(source, target, options)
    else:
        named = options.quantizer() if source.quantizer is None and options.given() else None
        prepared = prepare(source, named, options.force, warnings)
        if folds:
            prepared = fold(prepared)
        written = write_folder(
            prepared,
            target,
            form,
            weights=options.weights,
            max_shard_bytes=options.max_shard_size,
            overwrite=options.overwrite,
            tokenizer=options.tokenizer,
        )
        warnings += written["warnings"]
    return {
        "input": str(source.path),
        "input_kind": source.kind,
        "input_form": source.form,
        "output": str(target),
        "format": options.format,
        "form": form,
        "tensors": len(source.shapes()),
        **written,
        "warnings": warnings,
    }


def check_places(input: Path, output: Path) -> Path:
    """Refuse an output inside the input, or around it; return it without symbolic links."""
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
    return real_output


def prepare(
    source: ModelSource, named: Quantizer | None, force: bool, warnings: list[str]
) -> ModelSource:
    """Return a model with the quantiser that was named for it; refuse latents that are none.

    With `force`, latents that look untrained only add a sentence to `warnings`.
    """
    if named is not None:
        source = dataclasses.replace(source, quantizer=named, form="latent")
        warnings += check_trained(source, "input", force)
    elif source.form == "latent" and source.kind == "hf":
        check_latents(source, "input")  # weights that were exchanged beside a stamp
    return source


def _folds(options: ConvertOptions, source: ModelSource) -> bool:
    """Whether the constants of a MiniCPM are to be multiplied into its weights."""
    wanted = options.architecture
    if wanted is None or (wanted == source.model.architecture and source.model.has_constants):
        return False
    if not source.model.has_constants:
        rule = "has an effect on a MiniCPM only, and the input is a Llama"
        if source.folding is not None:
            rule = "the input is a folded MiniCPM, and folding cannot be undone"
        raise CheckpointError(f"architecture={wanted}: {rule}. Leave it out.")
    return True


def _write_megatron(source: ModelSource, output: Path, options: ConvertOptions) -> dict[str, Any]:
    write: Callable[..., dict[str, Any]] = write_torch_dist
    if options.format == "legacy":
        write = functools.partial(write_legacy, transformer_impl=options.transformer_impl)
    written = write(
        source,
        output,
        options.layout,
        overwrite=options.overwrite,
        check=lambda folder: verify_written(folder, source, output),
    )
    return {**written, "padding_rows": written["padded_vocab_size"] - source.vocab_size}
