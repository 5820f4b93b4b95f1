"""``bitcpm_model.json``: what a converted checkpoint is, readable without Megatron.

A checkpoint that a converter wrote has this file where one of a training run has its configuration
and state. Beside it, ``hf/`` keeps the files of the Hugging Face folder that are no weights
(tokenizer, chat template, generation settings), byte for byte.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_bitcpm.config import ModelConfig
from megatron_bitcpm.errors import CheckpointError, one_line

MODEL_FILE = "bitcpm_model.json"
SIDE_FOLDER = "hf"
FORMAT_VERSION = 1
"""Version of ``bitcpm_model.json``; raised when older readers would misread it."""


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """Content of ``bitcpm_model.json``.

    Attributes:
        form: latent, pseudo or plain, see `conversion.source`.
        model: the architecture.
        vocab_size: ids of the tokenizer.
        padded_vocab_size: rows of the embedding.
        quantizer: stamp of the quantiser, or None.
        folding: constants that were multiplied into the weights, or None.
        facts: what is known of the training: iteration, tokens, valid_loss, ...
        layout: tensor, pipeline and virtual pipeline size that the files were cut for.
    """

    form: str
    model: ModelConfig
    vocab_size: int
    padded_vocab_size: int
    quantizer: dict[str, Any] | None = None
    folding: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of the file."""
        content = asdict(self) | {"model": self.model.model_dump(mode="json")}
        return json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2) + "\n"


def read_model_file(folder: Path) -> ModelFile:
    """Return ``bitcpm_model.json`` of a converted checkpoint.

    Raises:
        CheckpointError: unreadable, incomplete, or written by a newer format.
    """
    path = folder / MODEL_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format_version")
        if version == FORMAT_VERSION:
            model = ModelConfig(**content.pop("model"))
            found = ModelFile(model=model, **content)
            _check(found)
            return found
    # pydantic's ValidationError is a ValueError.
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint={path}: cannot be read: {one_line(error) or type(error).__name__}. "
            "The checkpoint is damaged; convert it again."
        ) from error
    raise CheckpointError(
        f"format_version={version}: this package reads {FORMAT_VERSION}, in {path}. Use the "
        "package version that wrote the checkpoint."
    )


def _check(found: ModelFile) -> None:
    if found.form not in ("latent", "pseudo", "plain"):
        raise ValueError(f"form {found.form!r}")
    for name in ("vocab_size", "padded_vocab_size"):
        value = getattr(found, name)
        # A bool is an int in Python.
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} {value!r} is not a valid size")
    for name in ("quantizer", "folding", "facts", "layout"):
        value = getattr(found, name)
        may_be_absent = name in ("quantizer", "folding")
        if not isinstance(value, dict) and not (may_be_absent and value is None):
            raise ValueError(f"{name} is not an object")
