"""Write a model as a Hugging Face folder, tensor by tensor: complete and verified, or absent.

Three forms: ``pseudo``, the values of the training forward under ordinary names, which Transformers
and vLLM load as any model; ``latent``, the trained parameters with a modelling file that quantises
them in its forward; ``plain``, a model without a quantiser. Every folder is compared with its
source before it gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_bitcpm.checkpoint.model_file import SIDE_FOLDER
from megatron_bitcpm.conversion.hf.bin_writer import write_bin
from megatron_bitcpm.conversion.hf.config import (
    CONFIG_FILE,
    FOLDING_KEY,
    GENERATION_FILE,
    QUANTIZER_FILE,
    hf_config,
)
from megatron_bitcpm.conversion.hf.fold import FoldedSource, fold
from megatron_bitcpm.conversion.hf.model_card import write_model_card
from megatron_bitcpm.conversion.hf.modeling.writer import write_modeling_files
from megatron_bitcpm.conversion.hf.safetensors_writer import write_safetensors
from megatron_bitcpm.conversion.hf.source import (
    BIN_FILE,
    BIN_INDEX_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
)
from megatron_bitcpm.conversion.names import HF_EMBEDDING
from megatron_bitcpm.conversion.open import open_source
from megatron_bitcpm.conversion.output_folder import new_folder
from megatron_bitcpm.conversion.progress import track_tensors
from megatron_bitcpm.conversion.quantization_error import measure_latents
from megatron_bitcpm.conversion.source import Form, ModelSource
from megatron_bitcpm.conversion.stamp import QuantizerStamp
from megatron_bitcpm.conversion.tensor_stream import (
    count_bytes,
    cut_shards,
    is_finite,
    read_ahead,
)
from megatron_bitcpm.conversion.verify import verify_sources
from megatron_bitcpm.data.tokenizer_ids import VOCABULARY_FILES, TokenizerIds, read_tokenizer_ids
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import TOKENIZER_FILES, hash_files, read_json
from megatron_bitcpm.version import __version__

MAX_SHARD_BYTES = 5_000_000_000
FORMAT_VERSION = 1
"""Version of ``bitcpm_quantizer.json``."""

_BESIDE_TOKENIZER = (
    "bitcpm_tokenizer.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
)
_TEMPLATE_FOLDER = "additional_chat_templates"
_FILES = {
    "safetensors": (WEIGHTS_FILE, INDEX_FILE, write_safetensors),
    "bin": (BIN_FILE, BIN_INDEX_FILE, write_bin),
}


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
        source, output, form, overwrite=overwrite, max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer,
    )  # fmt: skip
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
    tokenizer_folder, ids = _find_tokenizer(source, tokenizer, warnings)
    with new_folder(output, overwrite, lambda folder: (folder / CONFIG_FILE).is_file()) as scratch:
        start = time.perf_counter()
        files, total_bytes = _write_tensors(scratch, source, form, weights, max_shard_bytes)
        config = _write_side_files(scratch, source, form, tokenizer_folder, ids)
        written = time.perf_counter()
        verified = verify_sources(open_source(scratch), source)
        done = time.perf_counter()
        verified["folder"] = str(output)
        folding = _describe_folding(source)
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
        raise CheckpointError.of(
            "output", output, "is the input, or holds it", "Name another folder"
        )
    if source in output.parents and (source / CONFIG_FILE).is_file():
        raise CheckpointError.of("output", output, "lies in the input", "Name another folder")


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
            raise CheckpointError.of(
                "quantizer", stamp.quant.grid, f"{source.path} names its own", "Leave it out"
            )
        source = dataclasses.replace(source, stamp=stamp, form="latent")
        _check_trained(source, stamp, force, warnings)
    possible = {"latent": ("latent", "pseudo"), "pseudo": ("pseudo",), "plain": ("plain",)}
    if form not in possible[source.form]:
        raise CheckpointError.of(
            "form", form, f"cannot be made of {source.path}, which is {source.form}",
            f"Use {' or '.join(possible[source.form])}",
        )  # fmt: skip
    if architecture not in (None, source.model.architecture):
        if architecture != "llama":
            raise CheckpointError.of(
                "architecture", architecture, f"{source.path} is a {source.model.architecture}",
                "Leave it out",
            )  # fmt: skip
        if form == "latent":
            raise CheckpointError.of(
                "architecture", architecture, "latent weights are never folded",
                "Write it as minicpm, or write the pseudo-quantised form",
            )  # fmt: skip
        source = fold(source)
    elif form != "latent" and source.model.architecture == "minicpm":
        model = source.model
        if model.head_dim * model.num_attention_heads != model.hidden_size:
            warnings.append(
                f"vLLM takes hidden / heads for the head size of a minicpm, this one has "
                f"{model.head_dim}: serve it with Transformers, or write it as llama"
            )
    return source


def _check_trained(
    source: ModelSource, stamp: QuantizerStamp, force: bool, warnings: list[str]
) -> None:
    """Refuse latents that show no training on their grid, unless forced; a stamp would vouch."""
    grid = stamp.quant.grid
    figures = measure_latents(source.shapes(), source.tensor, source.model.num_layers, stamp)
    if figures.looks_trained(grid):
        return
    rule = f"latents that show no training on the {grid} grid: {figures.describe(grid)}"
    if not force:
        raise CheckpointError.of(
            "source", source.path, f"{rule}, and no stamp says otherwise",
            "Quantising destroys such a model; add --force to go on",
        )  # fmt: skip
    warnings.append(f"{source.path}: {rule}")


def _find_tokenizer(
    source: ModelSource, tokenizer: str | Path | None, warnings: list[str]
) -> tuple[Path | None, TokenizerIds | None]:
    folder = Path(tokenizer) if tokenizer is not None else source.side_files
    recorded = None if source.kind == "hf" else source.facts.get("tokenizer_sha256")
    if folder is None and recorded is not None:
        raise CheckpointError.of(
            "tokenizer", None, f"the one of {source.path} is not where its training had it",
            "Name it (--tokenizer)",
        )  # fmt: skip
    if folder is not None and (tokenizer is not None or recorded is not None):
        ids = read_tokenizer_ids(folder, source.vocab_size)
        if recorded not in (None, hash_files(folder, TOKENIZER_FILES)):
            raise CheckpointError.of(
                "tokenizer", folder,
                "is not the one of the training (its files have another sha256)",
                "Name the tokenizer of the run (--tokenizer)",
            )  # fmt: skip
        return folder, ids
    if folder is None or not any((folder / name).is_file() for name in VOCABULARY_FILES):
        warnings.append(f"{source.path} comes without a tokenizer, and so does the folder")
        return folder, None
    ids = read_tokenizer_ids(folder)
    if ids.size > source.vocab_size:
        raise CheckpointError.of(
            "tokenizer", folder, f"its files hold {ids.size} ids, the model has "
            f"{source.vocab_size}",
            "Name the tokenizer of the model (--tokenizer)",
        )  # fmt: skip
    return folder, ids


def _write_tensors(
    scratch: Path, source: ModelSource, form: Form, weights: str, max_shard_bytes: int
) -> tuple[list[str], int]:
    """Write the weight files, and their index where there are several."""
    if weights not in _FILES:
        raise CheckpointError.of("weights", weights, "is unknown", f"Use {' or '.join(_FILES)}")
    single, index_name, write = _FILES[weights]
    layout = {name: (shape, source.dtype(name)) for name, shape in source.shapes().items()}
    sizes = {name: count_bytes(*entry) for name, entry in layout.items()}
    shards = cut_shards(sizes, max_shard_bytes)
    stem, _, suffix = single.partition(".")
    files = [single]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        files = [f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in numbers]
    with closing(read_ahead(_iter_tensors(source, form, sizes))) as tensors:
        for file, names in zip(files, shards, strict=True):
            part = {name: layout[name] for name in names}
            write(scratch / file, part, _take(tensors, len(names)))
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(scratch / index_name, index)
    return files, sum(sizes.values())


def _take(tensors: Iterator[tuple[str, torch.Tensor]], count: int) -> Iterator[Any]:
    # Not `islice`, which keeps its last item.
    for _ in range(count):
        yield next(tensors)


def _iter_tensors(
    source: ModelSource, form: Form, sizes: Mapping[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in track_tensors(sizes, "write"):
        tensor = source.tensor(name) if form == "latent" else source.forward_tensor(name)
        if not is_finite(tensor):
            row = int((~tensor.isfinite()).nonzero()[0][0])
            raise CheckpointError.of(
                "checkpoint", source.path, f"{name} holds a NaN or an infinity, first in row {row}",
                "The run had diverged; use an earlier checkpoint",
            )  # fmt: skip
        yield name, tensor
        del tensor


def _write_side_files(
    scratch: Path,
    source: ModelSource,
    form: Form,
    tokenizer: Path | None,
    ids: TokenizerIds | None,
) -> dict[str, Any]:
    """Write everything but the weights and the card; return config.json."""
    if tokenizer is not None:
        for name in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, scratch / name)
        if (tokenizer / _TEMPLATE_FOLDER).is_dir():
            shutil.copytree(tokenizer / _TEMPLATE_FOLDER, scratch / _TEMPLATE_FOLDER)
    original = _find_original_config(source)
    config = hf_config(source.model, source.dtype(HF_EMBEDDING), source.vocab_size, ids, original)
    config |= write_modeling_files(scratch, source.model, form, source.stamp)
    folding = _describe_folding(source)
    if form == "plain" and folding is not None:
        config[FOLDING_KEY] = folding
    _write_json(scratch / CONFIG_FILE, config)
    if not (scratch / GENERATION_FILE).is_file():
        _write_json(scratch / GENERATION_FILE, _generation_config(config))
    if form == "pseudo":
        _write_json(scratch / QUANTIZER_FILE, _describe_quantizer(source, folding))
    return config


def _find_original_config(source: ModelSource) -> dict[str, Any] | None:
    """Return the config.json that the model came with; a tokenizer's folder may have a foreign."""
    folder = source.side_files
    if folder is None or not (source.kind == "hf" or folder.name == SIDE_FOLDER):
        return None
    path = folder / CONFIG_FILE
    return read_json(path) if path.is_file() else None


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json of a model that came without one.

    Without a padding token generation pads with the end token, which it would do with a warning.
    """
    bos, eos, pad = (config.get(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    if pad is None:
        pad = eos[0] if isinstance(eos, list) and eos else eos
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def _describe_folding(source: ModelSource) -> dict[str, Any] | None:
    """Return the factors and, when they were applied here, what they rounded."""
    if source.folding is None:
        return None
    described = dataclasses.asdict(source.folding)
    if isinstance(source, FoldedSource):
        described["largest_relative_rounding"] = max(source.rounding.values(), default=0.0)
    return described


def _describe_quantizer(source: ModelSource, folding: dict[str, Any] | None) -> dict[str, Any]:
    """Return ``bitcpm_quantizer.json``: what reproduces the values, and where they are."""
    assert source.stamp is not None
    content = {
        "format_version": FORMAT_VERSION,
        "format": "pseudo-quantized",
        "megatron_bitcpm": __version__,
        "quantizer": source.stamp.content(),
        "source": {"checkpoint": source.path.name, **source.facts},
        "ternary_tensors": source.quantized_tensors(),
    }
    return content if folding is None else {**content, "folding": folding}


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
