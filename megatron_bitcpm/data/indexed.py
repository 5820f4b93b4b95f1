"""Checks of Megatron indexed datasets (`.bin` + `.idx`), before Megatron opens them.

Megatron maps both files without looking: a cut index ends in a numpy traceback, and a data file of
another run gives wrong tokens without any error. Layout of the index, little endian
(megatron/core/datasets/indexed_dataset.py): 9 bytes magic, uint64 version 1, uint8 dtype code,
uint64 sequences, uint64 document marks; int32 lengths, int64 byte offsets, int64 document marks.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megatron_bitcpm.errors import DataError
from megatron_bitcpm.records import Record, explain

INDEX_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_DTYPES: dict[int, Any] = {4: np.int32, 5: np.int64, 8: np.uint16}
_CHECK_BLOCK = 1 << 22
_MAX_SCANNED_TOKENS = 1 << 28
_MAX_CHECKED_DOCUMENTS = 1 << 16
_HASHED_BLOCKS, _HASHED_BLOCK_BYTES = 64, 1 << 16
_PREPARE_AGAIN = "Run prepare again, or copy both files from one run"


@dataclass(frozen=True)
class IndexedFiles:
    """What the index of one split says, after the checks of `check_indexed_files`.

    `prefix` is the path without ``.bin`` and ``.idx``; `sequence_lengths` [documents] int32 counts
    tokens. `fingerprint` hashes the index file and up to 64 evenly spread blocks of 64 KiB of the
    data file: smaller files count whole.
    """

    prefix: str
    dtype: np.dtype[Any]
    sequence_lengths: np.ndarray
    num_tokens: int
    fingerprint: str

    def tokens(self) -> np.ndarray:
        """Return a read-only memory map of all token ids, [num_tokens]."""
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")


def check_indexed_files(prefix: str | os.PathLike[str], field: str = "data") -> IndexedFiles:
    """Read the index at `prefix`; refuse files that are absent, cut or do not belong together.

    `field` is the configuration key that named it, for messages.
    """
    try:
        return _read_index(os.fspath(prefix), field)
    except OSError as error:
        raise DataError(
            f"{field}={prefix}: cannot be read ({error.strerror}). Check the files' permissions."
        ) from error


def _read_index(prefix: str, field: str) -> IndexedFiles:
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(f"{field}={path}: no such file. Run prepare, or check the prefix.")
    idx_size = idx_path.stat().st_size
    if idx_size < _HEADER.size:
        raise DataError(f"{field}={idx_path}: cut off at {idx_size} bytes. {_PREPARE_AGAIN}.")
    # mapped, not read: the ranks of a node share the pages of an index of gigabytes
    raw = np.memmap(idx_path, dtype=np.uint8, mode="r").data
    magic, version, code, sequences, marks = _HEADER.unpack_from(raw)
    if magic != INDEX_MAGIC or version != 1:
        raise DataError(
            f"{field}={idx_path}: not a Megatron index (wrong magic or version). {_PREPARE_AGAIN}."
        )
    if code not in _TOKEN_DTYPES:
        raise DataError(
            f"{field}={idx_path}: dtype code {code} is not a type of token ids (uint16, int32 or "
            f"int64). {_PREPARE_AGAIN}."
        )
    expected = _HEADER.size + sequences * (4 + 8) + marks * 8
    # a multimodal index has one more byte a sequence: not ours either
    if len(raw) != expected:
        raise DataError(
            f"{field}={idx_path}: {len(raw)} bytes, its header says {expected}. {_PREPARE_AGAIN}."
        )
    lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size)
    offsets = np.frombuffer(raw, np.int64, sequences, _HEADER.size + 4 * sequences)
    ends = np.frombuffer(raw, np.int64, marks, _HEADER.size + 12 * sequences)
    dtype = np.dtype(_TOKEN_DTYPES[code])
    num_tokens = int(lengths.sum(dtype=np.int64))
    if num_tokens == 0:
        raise DataError(f"{field}={prefix}: holds no token. Give more text to prepare.")
    consistent = (
        lengths.min() >= 0
        and marks > 0
        and ends[-1] == sequences
        and offsets[0] == 0
        and np.array_equal(np.diff(offsets), lengths[:-1].astype(np.int64) * dtype.itemsize)
    )
    if not consistent:
        raise DataError(
            f"{field}={idx_path}: lengths and offsets contradict each other. {_PREPARE_AGAIN}."
        )
    size = bin_path.stat().st_size
    if size != num_tokens * dtype.itemsize:
        raise DataError(
            f"{field}={bin_path}: {size} bytes, its index says {num_tokens} {dtype.name} tokens, "
            f"{num_tokens * dtype.itemsize} bytes. {_PREPARE_AGAIN}."
        )
    return IndexedFiles(prefix, dtype, lengths, num_tokens, _fingerprint(raw, bin_path, size))


def _fingerprint(index: memoryview, bin_path: Path, size: int) -> str:
    digest = hashlib.sha256(index)
    blocks = -(-size // _HASHED_BLOCK_BYTES)
    count = min(blocks, _HASHED_BLOCKS)
    with open(bin_path, "rb") as stream:
        for i in range(count):
            # the first, the last and those between
            block = i * (blocks - 1) // max(1, count - 1)
            stream.seek(block * _HASHED_BLOCK_BYTES)
            digest.update(stream.read(_HASHED_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def check_token_range(files: IndexedFiles, vocab_size: int, field: str = "data") -> None:
    """Refuse token ids outside [0, vocab_size).

    Up to 2**28 tokens are all read (about a second); of more, evenly spread blocks.
    """
    tokens = files.tokens()
    blocks = -(-len(tokens) // _CHECK_BLOCK)
    step = max(1, -(-len(tokens) // _MAX_SCANNED_TOKENS))
    for block in range(0, blocks, step):
        part = tokens[block * _CHECK_BLOCK : (block + 1) * _CHECK_BLOCK]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"{field}={files.prefix}.bin: token id {low if low < 0 else high} is outside the "
                f"vocabulary of {vocab_size}. Use the tokenizer the data was prepared with."
            )


def check_documents_end(files: IndexedFiles, eod: int, field: str) -> None:
    """Refuse documents that do not end with the end-of-document token, which marks their end.

    Looks at every document, or at evenly spread ones of more than 2**16.
    """
    lengths = files.sequence_lengths
    step = -(-len(lengths) // _MAX_CHECKED_DOCUMENTS)
    last = np.cumsum(lengths, dtype=np.int64)[::step] - 1
    bad = np.flatnonzero((files.tokens()[last] != eod) & (lengths[::step] > 0))
    if len(bad):
        raise DataError(
            f"{field}={files.prefix}: document {bad[0] * step} does not end with the "
            f"end-of-document token {eod}, so reset_attention_mask, reset_position_ids and "
            "eod_mask_loss cannot see its end. Prepare it with that token at the end of documents, "
            "or leave these options out."
        )


class _Split(Record):
    tokens: int


class _Splits(Record):
    train: _Split
    valid: _Split


class Manifest(Record):
    """What training needs of the manifest; `prepare` writes more into it."""

    tokenizer_sha256: str
    splits: _Splits


def manifest_path(data_prefix: str | os.PathLike[str]) -> Path:
    """Return the path of the manifest that `prepare` writes beside the data."""
    return Path(f"{os.fspath(data_prefix)}.json")


def read_manifest(data_prefix: str | os.PathLike[str], field: str = "data") -> Manifest | None:
    """Return the manifest of prepared data, or None for data that other tools wrote."""
    path = manifest_path(data_prefix)
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{field}={path}: not a manifest ({explain(error)}). Run prepare again."
        ) from error
