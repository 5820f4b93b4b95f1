"""What lies beside the weights of a Hugging Face folder: config.json, tokenizer, stamp."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bitcpm.arch.hf_config import CONFIG_FILE, FOLDING_KEY, QUANTIZER_KEY, hf_config
from megatron_bitcpm.arch.model import Form
from megatron_bitcpm.arch.tensors import EMBEDDING
from megatron_bitcpm.checkpoint.model_file import SIDE_FOLDER
from megatron_bitcpm.conversion.hf.config import GENERATION_FILE, QUANTIZER_FILE
from megatron_bitcpm.conversion.hf.fold import FoldedSource
from megatron_bitcpm.conversion.hf.modeling.writer import write_modeling_files
from megatron_bitcpm.conversion.source import ModelSource
from megatron_bitcpm.conversion.tensor_stream import dtype_name
from megatron_bitcpm.data.tokenizer_ids import (
    TokenizerIds,
    has_vocabulary,
    read_run_tokenizer,
    read_tokenizer_ids,
)
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import TOKENIZER_FILES, read_json, write_json
from megatron_bitcpm.version import __version__

FORMAT_VERSION = 1
"""Version of ``bitcpm_quantizer.json``."""

_BESIDE_TOKENIZER = (
    "bitcpm_tokenizer.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
)
_TEMPLATE_FOLDER = "additional_chat_templates"


def find_tokenizer(
    source: ModelSource, tokenizer: str | Path | None, warnings: list[str]
) -> tuple[Path | None, TokenizerIds | None]:
    """Return the folder of the model's tokenizer, and its special tokens where they are known.

    `warnings` gets a sentence where the model comes without one.

    Raises:
        CheckpointError: it is absent, or not that of the model.
    """
    folder = Path(tokenizer) if tokenizer is not None else source.side_files
    if folder is not None and _has_own_code(folder):
        warnings.append(f"the tokenizer of {folder} needs code of its own, which is not copied")
    recorded = None if source.kind == "hf" else source.facts.get("tokenizer_sha256")
    if folder is None and recorded is not None:
        raise CheckpointError(
            f"tokenizer=None: the one of {source.path} is not where its training had it. Name it "
            "(--tokenizer)."
        )
    if folder is not None and (tokenizer is not None or recorded is not None):
        return folder, read_run_tokenizer(folder, source.vocab_size, recorded)
    if folder is None or not has_vocabulary(folder):
        warnings.append(f"{source.path} comes without a tokenizer, and so does the folder")
        return folder, None
    ids = read_tokenizer_ids(folder)
    if ids.size > source.vocab_size:
        raise CheckpointError(
            f"tokenizer={folder}: its files hold {ids.size} ids, the model has "
            f"{source.vocab_size}. Name the tokenizer of the model (--tokenizer)."
        )
    return folder, ids


def _has_own_code(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.is_file() and "AutoTokenizer" in (read_json(path).get("auto_map") or ())


def write_side_files(
    folder: Path,
    source: ModelSource,
    form: Form,
    tokenizer: Path | None,
    ids: TokenizerIds | None,
) -> dict[str, Any]:
    """Write everything but the weights and the card; return the content of config.json.

    `source` is the model as written, folded where it was; `tokenizer` and `ids` are those of
    `find_tokenizer`.
    """
    if tokenizer is not None:
        copy_companions(tokenizer, folder)
    path = find_original_config(source)
    original = None if path is None else read_json(path)
    # Values on the grid must not be rounded in loading; see `verify`.
    dtype = source.dtype(next(iter(source.quantized_tensors()), EMBEDDING.hf))
    special_ids = None if ids is None else dataclasses.asdict(ids)
    config = hf_config(source.model, dtype_name(dtype), source.vocab_size, special_ids, original)
    config |= write_modeling_files(folder, source.model, form, source.quantizer)
    folding = describe_folding(source)
    if form == "plain" and folding is not None:
        config[FOLDING_KEY] = folding
    if not (folder / GENERATION_FILE).is_file():
        write_json(folder / GENERATION_FILE, _generation_config(config))
    if form == "latent":
        config[QUANTIZER_KEY]["source"] = _describe_origin(source)
    write_json(folder / CONFIG_FILE, config)
    if form == "pseudo":
        write_json(folder / QUANTIZER_FILE, _describe_quantizer(source, folding))
    return config


def copy_companions(folder: Path, target: Path) -> None:
    """Copy tokenizer, chat templates and generation settings, as far as they are there."""
    if (folder / GENERATION_FILE).is_file():
        read_json(folder / GENERATION_FILE)  # refuses settings that nothing could load
    for name in (*TOKENIZER_FILES, *_BESIDE_TOKENIZER):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if (folder / _TEMPLATE_FOLDER).is_dir():
        shutil.copytree(folder / _TEMPLATE_FOLDER, target / _TEMPLATE_FOLDER)


def _describe_origin(source: ModelSource) -> dict[str, Any]:
    return {"checkpoint": source.path.name, **source.facts}


def find_original_config(source: ModelSource) -> Path | None:
    """Return the config.json that the model came with; a tokenizer's folder may have a foreign."""
    folder = source.side_files
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return None
    if source.kind != "hf" and folder.resolve() != (source.path / SIDE_FOLDER).resolve():
        return None
    return folder / CONFIG_FILE


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json of a model that came without one."""
    bos, eos, pad = (config.get(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    if pad is None:  # generation would pad with the end token too, and warn
        pad = eos[0] if isinstance(eos, list) and eos else eos
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def describe_folding(source: ModelSource) -> dict[str, Any] | None:
    """Return the factors and, when they were applied here, what they rounded."""
    if source.folding is None:
        return None
    described = source.folding.model_dump()
    if isinstance(source, FoldedSource):
        described["largest_relative_rounding"] = max(source.rounding.values(), default=0.0)
    return described


def _describe_quantizer(source: ModelSource, folding: dict[str, Any] | None) -> dict[str, Any]:
    """Return ``bitcpm_quantizer.json``: what reproduces the values, and where they are."""
    assert source.quantizer is not None
    content = {
        "format_version": FORMAT_VERSION,
        "format": "pseudo-quantized",
        "megatron_bitcpm": __version__,
        "quantizer": source.quantizer.stamp(),
        "source": _describe_origin(source),
        "ternary_tensors": source.quantized_tensors(),
    }
    return content if folding is None else {**content, "folding": folding}
