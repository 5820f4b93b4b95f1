"""Load a tokenizer: one trained here (`tokenizer_train`), or any Hugging Face tokenizer folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_bitcpm.data.tokenizer_export import MARKER_FILE, Marker
from megatron_bitcpm.errors import DataError, one_line
from megatron_bitcpm.files import TOKENIZER_FILES, tokenizer_sha256

logger = logging.getLogger(__name__)


class TextTokenizer:
    """What the data pipeline and Megatron's GPTDataset need of a tokenizer.

    `vocab_size` is the largest id + 1 (the embedding may be padded beyond it). The end token also
    separates documents. `encode` adds no special token, and never turns text into one: ``</s>`` in
    a document is four characters.
    """

    def __init__(self, folder: Path, vocab_size: int, bos_id: int | None, eos_id: int) -> None:
        self.folder = folder
        self.sha256 = tokenizer_sha256(folder)
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without begin or end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text; the result does not depend on `threads`."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens are left out."""
        raise NotImplementedError

    # Names that megatron.core.datasets reads.

    @property
    def eod(self) -> int:
        """End of document, Megatron's name for `eos_id`."""
        return self.eos_id

    @property
    def eos(self) -> int:
        """Same as `eos_id`."""
        return self.eos_id

    @property
    def pad(self) -> int:
        """An id that never occurs."""
        # GPTDataset takes every label equal to the pad id out of the loss, and 0.12 does so in its
        # cached mask: with pad == eos more and more tokens stop counting.
        return -1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What Megatron hashes into the name of its index caches."""
        return {"class": "TextTokenizer", "sha256": self.sha256}


class SentencePieceTokenizer(TextTokenizer):
    """A folder written by `train_tokenizer`, read with sentencepiece alone."""

    def __init__(self, folder: Path) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(
            model_file=str(folder / "tokenizer.model")
        )
        super().__init__(
            folder,
            vocab_size=self._processor.get_piece_size(),
            bos_id=self._processor.bos_id(),
            eos_id=self._processor.eos_id(),
        )

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text, on `threads` threads."""
        ids: list[list[int]] = self._processor.encode(
            list(texts), out_type=int, num_threads=threads
        )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; begin and end tokens are left out."""
        return str(self._processor.decode([int(i) for i in ids]))


class HuggingFaceTokenizer(TextTokenizer):
    """Any tokenizer folder that `transformers.AutoTokenizer` reads without remote code."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise DataError(
                f"tokenizer={folder}: a Hugging Face tokenizer needs transformers, which is not "
                "installed. Install megatron-bitcpm[hf], or train a tokenizer with this package."
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds, from OSError to TypeError
            reason = one_line(error, 300)
            raise DataError(
                f"tokenizer={folder}: transformers cannot load it ({type(error).__name__}: "
                f"{reason}). Give a folder with tokenizer.json and tokenizer_config.json."
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                f"tokenizer={folder}: it has no end-of-sequence token, which separates documents. "
                'Set "eos_token" in tokenizer_config.json.'
            )
        super().__init__(
            folder,
            vocab_size=max(self._tokenizer.get_vocab().values()) + 1,
            bos_id=self._tokenizer.bos_token_id,
            eos_id=self._tokenizer.eos_token_id,
        )

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text; `threads` is left to the tokenizers library."""
        if not texts:
            return []
        # verbose=False: documents longer than model_max_length are normal here
        encoded: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; special tokens are left out."""
        return str(
            self._tokenizer.decode(
                [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def load_tokenizer(folder: str | os.PathLike[str]) -> TextTokenizer:
    """Load a Hugging Face tokenizer folder, or one written by `train_tokenizer`.

    The second kind is read by sentencepiece, which gives the same ids faster, unless its files
    were edited since (the marker's hash tells). Nothing is downloaded, no remote code is run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"tokenizer={folder}: no such folder. Train one, or give a Hugging Face folder."
        )
    marker = folder / MARKER_FILE
    if marker.is_file():
        try:
            written = Marker.model_validate_json(marker.read_bytes()).sha256
        except ValidationError:
            written = None
        if written == tokenizer_sha256(folder):
            return SentencePieceTokenizer(folder)
        logger.info("%s was edited after training, reading it with transformers", folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            f"tokenizer={folder}: the folder holds no tokenizer file. Give a folder with "
            "tokenizer.json or tokenizer.model."
        )
    return HuggingFaceTokenizer(folder)
