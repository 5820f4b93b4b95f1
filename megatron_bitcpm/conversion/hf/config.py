"""What the JSON files of a Hugging Face folder say: architecture, type, form, quantiser, facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_bitcpm.arch.folding import Folding
from megatron_bitcpm.arch.hf_config import (
    CONFIG_FILE,
    FOLDING_KEY,
    QUANTIZER_KEY,
    parse_architecture,
)
from megatron_bitcpm.arch.hf_rope import HfProblem, locate_problems
from megatron_bitcpm.arch.model import Form, ModelConfig
from megatron_bitcpm.conversion.hf.modeling.writer import check_quantizer_block
from megatron_bitcpm.data.tokenizer_ids import has_vocabulary
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.files import read_json, tokenizer_sha256
from megatron_bitcpm.quantizer import Quantizer
from megatron_bitcpm.records import explain

GENERATION_FILE = "generation_config.json"
QUANTIZER_FILE = "bitcpm_quantizer.json"


@dataclass(frozen=True)
class Origin:
    """What the stamp of a folder says; fields as in `TensorSource`."""

    form: Form
    quantizer: Quantizer | None = None
    folding: Folding | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HfConfig:
    """What the JSON files of a folder say; `dtype` is the declared type, the files decide."""

    model: ModelConfig
    vocab_size: int
    dtype: torch.dtype | None
    origin: Origin


def read_hf_config(folder: Path) -> HfConfig:
    """Read config.json and the quantiser stamp of a folder.

    Raises:
        CheckpointError: absent, damaged, or a model that the decoder cannot express.
    """
    path = folder / CONFIG_FILE
    raw = read_json(path)
    model, vocab_size = parse_architecture(raw, path)
    origin = read_origin(folder, raw)
    if origin.facts.get("tokenizer_sha256") is not None and has_vocabulary(folder):
        # The model may have been trained on and its tokenizer saved anew; this one goes with it.
        origin.facts["tokenizer_sha256"] = tokenizer_sha256(folder)
    if origin.form == "latent" and origin.quantizer is not None:
        check_quantizer_block(raw[QUANTIZER_KEY], model, origin.quantizer, path)
    with locate_problems(path):
        return HfConfig(model, vocab_size, _read_dtype(raw), origin)


def _read_dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None or name == "auto":
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise HfProblem("torch_dtype", name, "is not a type of torch. Use bfloat16 or float32.")
    return dtype


def read_origin(folder: Path, raw: Mapping[str, Any]) -> Origin:
    """Return what the stamp of a folder says; `raw` is the content of its config.json."""
    inside, beside = raw.get(QUANTIZER_KEY), folder / QUANTIZER_FILE
    path = folder / CONFIG_FILE
    if inside is not None and beside.is_file():
        raise CheckpointError(
            f"folder={folder}: config.json has {QUANTIZER_KEY} (latents) and there is a "
            f"{QUANTIZER_FILE} (pseudo-quantised). Remove the one that does not belong to it."
        )
    if inside is not None:
        if not isinstance(inside, Mapping) or inside.get("form") != "latent":
            text = "is not that of a latent folder. Convert the model again."
            raise HfProblem(QUANTIZER_KEY, inside, text).locate(path)
        quantizer = Quantizer.from_stamp(inside.get("quantizer"), path)
        return Origin("latent", quantizer, None, _read_facts(inside))
    if not beside.is_file():
        return Origin("plain", None, _read_folding(raw.get(FOLDING_KEY), path))
    content = read_json(beside)
    folding, facts = _read_folding(content.get("folding"), beside), _read_facts(content)
    if content.get("quantizer") is None:
        return Origin("plain", None, folding, facts)
    return Origin("pseudo", Quantizer.from_stamp(content["quantizer"], beside), folding, facts)


def _read_facts(content: Mapping[str, Any]) -> dict[str, Any]:
    facts = content.get("source")
    return {k: v for k, v in facts.items() if k != "checkpoint"} if isinstance(facts, dict) else {}


def _read_folding(content: Any, path: Path) -> Folding | None:
    if content is None:
        return None
    try:
        return Folding.model_validate(content)
    except ValidationError as error:
        text = f"cannot be understood ({explain(error)}). Convert the model again."
        raise HfProblem("folding", content, text).locate(path) from error
