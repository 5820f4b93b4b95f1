"""``bitcpm_model.json``: what a converted checkpoint is, readable without Megatron.

It stands where a training run has its configuration and state. Beside it, ``hf/`` keeps the files
of the Hugging Face folder that are no weights (tokenizer, chat template, ...), byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from megatron_bitcpm.arch.folding import Folding
from megatron_bitcpm.arch.model import Form, ModelConfig
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.records import Record, explain

MODEL_FILE = "bitcpm_model.json"
SIDE_FOLDER = "hf"
FORMAT_VERSION = 1
"""Version of ``bitcpm_model.json``; raised when older readers would misread it."""
_Size = Annotated[int, Field(ge=1)]


class ModelFile(Record):
    """Content of ``bitcpm_model.json``: `padded_vocab_size` counts the rows of the embedding.

    `facts` is what is known of the training: iteration, tokens, valid_loss, ...; `layout` the
    tensor, pipeline and virtual pipeline size that the files were cut for.
    """

    format_version: int = FORMAT_VERSION
    form: Form
    model: ModelConfig
    vocab_size: _Size
    padded_vocab_size: _Size
    quantizer: dict[str, Any] | None = None
    folding: Folding | None = None
    facts: dict[str, Any] = Field(default_factory=dict)
    layout: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> ModelFile:
        if self.form != "plain" and self.quantizer is None:
            raise ValueError(f"form {self.form} needs a quantizer")
        rope = self.model.rope_scaling
        if rope is not None and rope.original_max_position_embeddings is None:
            raise ValueError("model.rope_scaling needs original_max_position_embeddings")
        for name in ("iteration", "tokens", "seq_length", "valid_loss"):
            value = self.facts.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"facts.{name} must be a number")
        return self

    def to_json(self) -> str:
        """Return the text of the file."""
        return self.model_dump_json(indent=2) + "\n"


def read_model_file(folder: Path) -> ModelFile:
    """Return ``bitcpm_model.json`` of a converted checkpoint."""
    path = folder / MODEL_FILE
    try:
        found = ModelFile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"checkpoint={path}: cannot be read: {explain(error)}. The checkpoint is damaged; "
            "convert it again."
        ) from error
    if found.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version={found.format_version}: this package reads {FORMAT_VERSION}, in "
            f"{path}. Use the package version that wrote the checkpoint."
        )
    return found
