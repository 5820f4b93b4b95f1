"""Write a model as a Hugging Face folder, tensor by tensor: complete and verified, or absent.

Three forms: ``pseudo``, the values of the training forward under ordinary names, which Transformers
and vLLM load as any model; ``latent``, the trained parameters with a modelling file that quantises
them in its forward; ``plain``, a model without a quantiser. Every folder is compared with its
source before it gets its name.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, Literal

from megatron_bitcpm.conversion.hf.config import CONFIG_FILE
from megatron_bitcpm.conversion.hf.fold import fold
from megatron_bitcpm.conversion.hf.model_card import write_model_card
from megatron_bitcpm.conversion.hf.side_files import (
    describe_folding,
    find_tokenizer,
    write_side_files,
)
from megatron_bitcpm.conversion.hf.weight_files import write_weight_files
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.output_folder import new_folder
from megatron_bitcpm.conversion.quantization_error import check_latents, check_trained
from megatron_bitcpm.conversion.source import Form, ModelSource
from megatron_bitcpm.conversion.stamp import QuantizerStamp
from megatron_bitcpm.conversion.verify import verify_written
from megatron_bitcpm.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a training checkpoint as the folder that serves it: `write_folder`, pseudo or plain.

    Args:
        checkpoint: a checkpoint, or a run's folder (its newest checkpoint).
        output: folder to write; its parents are made.
        tokenizer: tokenizer folder; default the one the run was configured with.
        overwrite: replace `output` when it is a model folder.
        max_shard_bytes: larger models are cut into files of about this size.
    Returns:
        The report of `verify`, and iteration, tokens, valid_loss, seq_length, files, bytes.

    Raises:
        CheckpointError: bad input; nothing is left behind and an old output is as it was.
    """
    source = open_source(checkpoint, tokenizer)
    form: Form = "plain" if source.form == "plain" else "pseudo"
    report = write_folder(
        source,
        output,
        form,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
    )
    facts = {key: source.facts.get(key) for key in ("tokens", "seq_length", "valid_loss")}
    return {
        **report["verify"],
        "iteration": source.facts.get("iteration"),
        **facts,
        "folder": report["folder"],
        "files": report["files"],
        "bytes": report["bytes"],
    }


def write_folder(
    source: ModelSource,
    output: str | Path,
    form: Form,
    *,
    architecture: Literal["llama", "minicpm"] | str | None = None,
    weights: Literal["safetensors", "bin"] | str = "safetensors",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    stamp: QuantizerStamp | None = None,
    force: bool = False,
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Write a model as a Hugging Face folder, and verify it.

    Args:
        source: the model.
        output: folder to write; its parents are made.
        form: latent, pseudo or plain; a latent model is never written plain.
        architecture: ``llama`` folds a MiniCPM into a plain Llama; default as it is.
        weights: kind of the weight files.
        max_shard_bytes: larger models are cut into files of at most this size.
        overwrite: replace `output` when it is a model folder.
        stamp: the quantiser that trained a source which does not say so.
        force: go on although the latents look as if they had not been trained on their grid.
        tokenizer: tokenizer folder; default the source's side files.
    Returns:
        folder, form, files (names), bytes, write_seconds, verify_seconds, verify (report of
        `verify_sources`), folding (None, or its factors and largest_relative_rounding), warnings.

    Raises:
        CheckpointError: bad input; nothing is left behind and an old output is as it was.
    """
    output = Path(os.path.realpath(output))
    _check_places(Path(os.path.realpath(source.path)), output)
    warnings: list[str] = []
    source = _prepare(source, form, architecture, stamp, force, warnings)
    tokenizer_folder, ids = find_tokenizer(source, tokenizer, warnings)
    with new_folder(output, overwrite) as scratch:
        start = time.perf_counter()
        files, total_bytes = write_weight_files(scratch, source, form, weights, max_shard_bytes)
        config = write_side_files(scratch, source, form, tokenizer_folder, ids)
        written = time.perf_counter()
        verified = verify_written(scratch, source, output)
        done = time.perf_counter()
        folding = describe_folding(source)
        card = write_model_card(source, form, config, verified, folding)
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return {
        "folder": str(output),
        "form": form,
        "files": files,
        "bytes": total_bytes,
        "write_seconds": round(written - start, 3),
        "verify_seconds": round(done - written, 3),
        "verify": verified,
        "folding": folding,
        "warnings": warnings,
    }


# -- what is written -------------------------------------------------------------------------------


def _check_places(source: Path, output: Path) -> None:
    if source == output or output in source.parents:
        raise CheckpointError(f"output={output}: is the input, or holds it. Name another folder.")
    if source in output.parents and (source / CONFIG_FILE).is_file():
        raise CheckpointError(f"output={output}: lies in the input. Name another folder.")


def _prepare(
    source: ModelSource,
    form: Form,
    architecture: str | None,
    stamp: QuantizerStamp | None,
    force: bool,
    warnings: list[str],
) -> ModelSource:
    """Return the source as it is written: with its quantiser, and folded where asked for."""
    if stamp is not None:
        if source.stamp is not None:
            raise CheckpointError(
                f"quantizer={stamp.quant.grid}: {source.path} names its own. Leave it out."
            )
        source = dataclasses.replace(source, stamp=stamp, form="latent")
        warnings += check_trained(*_latents_of(source), stamp, ("source", source.path), force)
    elif source.form == "latent" and source.kind == "hf" and source.stamp is not None:
        # Weights that were exchanged beside a stamp.
        check_latents(*_latents_of(source), source.stamp, ("source", source.path))
    possible = {"latent": ("latent", "pseudo"), "pseudo": ("pseudo",), "plain": ("plain",)}
    if form not in possible[source.form]:
        raise CheckpointError(
            f"form={form}: cannot be made of {source.path}, which is {source.form}. Use "
            f"{' or '.join(possible[source.form])}."
        )
    if architecture not in (None, source.model.architecture):
        if architecture != "llama":
            raise CheckpointError(
                f"architecture={architecture}: {source.path} is a {source.model.architecture}. "
                "Leave it out."
            )
        if form == "latent":
            raise CheckpointError(
                f"architecture={architecture}: latent weights are never folded. Write it as "
                "minicpm, or write the pseudo-quantised form."
            )
        source = fold(source)
    elif form != "latent" and source.model.architecture == "minicpm":
        model = source.model
        if model.head_dim * model.num_attention_heads != model.hidden_size:
            warnings.append(
                f"vLLM takes hidden / heads for the head size of a minicpm, this one has "
                f"{model.head_dim}: serve it with Transformers, or write it as llama"
            )
    return source


def _latents_of(source: ModelSource) -> tuple[Any, Any, int]:
    """Return what the checks of latent weights take: shapes, a reader, layers."""
    return source.shapes(), source.tensor, source.model.num_layers
