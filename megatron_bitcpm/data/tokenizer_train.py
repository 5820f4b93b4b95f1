"""Train a SentencePiece BPE tokenizer and write it as a Hugging Face folder.

Byte fallback, identity normalisation, no prefix space, runs of spaces kept and learnt as pieces:
decode(encode(text)) is text, except that U+2581, SentencePiece's space mark, decodes as a space.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_bitcpm.data import text as text_source
from megatron_bitcpm.data import tokenizer_export as export
from megatron_bitcpm.errors import DataError, one_line
from megatron_bitcpm.files import tokenizer_sha256, write_json
from megatron_bitcpm.publish import Output

# unknown, bos, eos and 256 bytes
_RESERVED_PIECES = 3 + 256
_TRAIN_CHUNK_CHARS = 4096


def train_tokenizer(
    inputs: Iterable[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    vocab_size: int = 4096,
    sample_mb: float = 32.0,
    character_coverage: float = 0.9995,
    jsonl_key: str = "text",
    max_bad_lines: int = 100,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a tokenizer of exactly `vocab_size` ids, at least 300; return its marker.

    Ids: ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, then the 256 bytes, then pieces. The result depends on
    the text and the arguments only, not on time, machine or folder names. `sample_mb` is the text
    to train on, 10**6 characters: of longer input every k-th document. `character_coverage` is the
    share of character occurrences that get a piece of their own, the rest is spelled in bytes;
    0.9995 is SentencePiece's advice for large alphabets. See `text.iter_documents` for the input.
    """
    output = Path(output_dir)
    if vocab_size < _RESERVED_PIECES + 41:
        raise DataError(f"vocab_size={vocab_size}: 259 ids are reserved. Use 300 or more.")
    if not 0 < sample_mb < 1e9:
        raise DataError(f"sample_mb={sample_mb}: must be above 0. Use 50.")
    files = text_source.list_input_files(inputs)
    texts = text_source.iter_documents(files, jsonl_key=jsonl_key, max_bad_lines=max_bad_lines)
    sample = _TrainingSample(files, texts, int(sample_mb * 1e6))
    target = Output(output, overwrite, "output_dir", DataError, _why_no_tokenizer)
    # Before the training: it is long, and a folder that cannot be written would waste it.
    with target.new_folder() as scratch:
        model = _train_model(sample, vocab_size, character_coverage)
        info: dict[str, Any] = {
            "vocab_size": vocab_size,
            "documents": sample.documents,
            "chars": sample.chars,
            "character_coverage": character_coverage,
        }
        export.write_hf_files(scratch, model)
        info["sha256"] = tokenizer_sha256(scratch)
        write_json(scratch / export.MARKER_FILE, info, indent=1)
    return info


def _why_no_tokenizer(output: Path) -> str | None:
    is_ours = (output / export.MARKER_FILE).is_file()
    return None if is_ours else "is not a trained tokenizer, so it is not replaced"


class _TrainingSample:
    """At most `limit_chars` of text, every k-th document, in pieces SentencePiece accepts."""

    def __init__(self, files: list[Path], texts: Iterator[str], limit_chars: int) -> None:
        self.files = files
        self.texts = texts
        self.limit_chars = limit_chars
        self.stride = max(1, -(-text_source.total_bytes(files) // max(1, limit_chars)))
        self.documents = 0
        self.chars = 0
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        # SentencePiece turns an exception of its iterator into a RuntimeError that names a line
        # of our source and not the reason: end early instead, `_train_model` raises it
        try:
            yield from self._sentences()
        except (Exception, KeyboardInterrupt) as error:
            self.error = error

    def _sentences(self) -> Iterator[str]:
        for index, document in enumerate(self.texts):
            if index % self.stride:
                continue
            if self.chars >= self.limit_chars:
                return
            self.documents += 1
            self.chars += len(document)
            for start in range(0, len(document), _TRAIN_CHUNK_CHARS):
                yield document[start : start + _TRAIN_CHUNK_CHARS]


def _train_model(sample: _TrainingSample, vocab_size: int, coverage: float) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    failure: Exception | None = None
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=export.UNK_ID,
            bos_id=export.BOS_ID,
            eos_id=export.EOS_ID,
            pad_id=-1,
            # the default of 4192 bytes would drop longer sentences without a word
            max_sentence_length=4 * _TRAIN_CHUNK_CHARS + 64,
            # BPE training hardly uses threads, and the number is stored in the model file
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        failure = error
    if sample.error is not None:
        raise sample.error
    if sample.documents == 0:
        raise DataError(
            f"input={sample.files[0]}: no text in {len(sample.files)} files. Give more text."
        )
    if failure is not None:
        reason = one_line(str(failure).rsplit("] ", 1)[-1])
        raise DataError(
            f"vocab_size={vocab_size}: SentencePiece cannot train on {sample.chars} characters "
            f"({reason}). Lower vocab_size, or give more text."
        ) from failure
    return model.getvalue()
