"""Text to Megatron indexed datasets: `<prefix>_{train,valid}.{bin,idx}` and `<prefix>.json`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bitcpm.data import text as text_source
from megatron_bitcpm.data.indexed import manifest_path
from megatron_bitcpm.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_bitcpm.errors import DataError
from megatron_bitcpm.files import write_json
from megatron_bitcpm.progress import Progress
from megatron_bitcpm.publish import Output
from megatron_bitcpm.version import __version__

SPLITS = ("train", "valid")
_BATCH_DOCUMENTS = 256


def prepare(
    inputs: Iterable[str | os.PathLike[str]],
    tokenizer_folder: str | os.PathLike[str],
    output_prefix: str | os.PathLike[str],
    *,
    valid_fraction: float = 0.03,
    jsonl_key: str = "text",
    document_chars: int = text_source.DOCUMENT_CHARS,
    max_bad_lines: int = 100,
    min_tokens: int = 2,
    threads: int = 0,
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Encode documents and write the train and valid splits; return the manifest beside them.

    Each document is its ids followed by the end-of-sequence id. Document number k (from 0) goes to
    valid when ``k % n == n - 1`` with n = round(1 / valid_fraction), whatever the threads (0: all
    processors). Give sequence length + 1 as `min_tokens`, the smallest size of a split, to learn
    now rather than at training whether one is too short. See `text.iter_documents` for the input.
    """
    if not 0 < valid_fraction <= 0.5:
        raise DataError(f"valid_fraction={valid_fraction}: must be in (0, 0.5]. Use 0.03 for 3 %.")
    prefix = Path(output_prefix)
    targets = [Path(f"{prefix}_{split}.{ext}") for split in SPLITS for ext in ("bin", "idx")]
    targets.append(manifest_path(prefix))
    tokenizer = load_tokenizer(tokenizer_folder)
    files = text_source.list_input_files(inputs)
    report = text_source.ReadReport()
    documents = text_source.iter_documents(
        files,
        jsonl_key=jsonl_key,
        document_chars=document_chars,
        max_bad_lines=max_bad_lines,
        report=report,
    )
    size = max(1, text_source.total_bytes(files))
    with Output(prefix, overwrite, "output_prefix", DataError).new_files(targets) as scratch:
        # Before the clock of the progress starts: this imports Megatron.
        writer = _SplitWriter(scratch, prefix.name, tokenizer, round(1 / valid_fraction))
        encoded = _encode(documents, tokenizer, threads or os.cpu_count() or 1)
        _write(writer, encoded, report, size, show_progress)
        _check_splits(writer, report, min_tokens, prefix)
        manifest = _describe(writer, report, tokenizer)
        write_json(scratch / manifest_path(prefix).name, manifest, indent=1)
    return manifest


def _write(
    writer: _SplitWriter,
    encoded: Iterator[list[int]],
    report: text_source.ReadReport,
    size: int,
    show_progress: bool,
) -> None:
    def list_counts(seconds: float) -> list[str]:
        """The most important comes last."""
        return [
            f"{report.lines:,} lines",
            f"{report.documents:,} documents",
            f"{writer.total_tokens:,} tokens",
            f"{report.bytes_read / 1e6:,.1f} of {size / 1e6:,.1f} MB",
            f"{writer.total_tokens / seconds:,.0f} tokens/s",
        ]

    with Progress("prepare", size, text=list_counts, enabled=show_progress) as progress:
        try:
            for ids in encoded:
                writer.add(ids)
                progress.update(report.bytes_read)
        finally:
            writer.close()


def _describe(
    writer: _SplitWriter, report: text_source.ReadReport, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Return the manifest."""
    return {
        "version": __version__,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": np.dtype(writer.dtype).name,
        "valid_every": writer.every,
        "splits": writer.counts,
        "input_files": report.files,
        "input_bytes": report.bytes_read,
        "chars": report.chars,
        "bad_lines": report.bad_lines,
        "skipped_files": report.skipped_files,
        "problems": report.problems,
    }


def _encode(
    documents: Iterator[str], tokenizer: TextTokenizer, threads: int
) -> Iterator[list[int]]:
    """Yield the ids of each document in order, end token included."""
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        for ids in tokenizer.encode_batch(batch, threads=threads):
            ids.append(tokenizer.eos_id)
            yield ids


class _SplitWriter:
    """One Megatron builder for each split, in the scratch folder."""

    def __init__(self, folder: Path, name: str, tokenizer: TextTokenizer, every: int) -> None:
        # imported late: Megatron takes two seconds, and `bitcpm --help` should not wait for it
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.every = every
        self.seen = 0
        self.counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        self._paths = {split: folder / f"{name}_{split}" for split in SPLITS}
        self._builders = {
            split: IndexedDatasetBuilder(f"{path}.bin", dtype=self.dtype)
            for split, path in self._paths.items()
        }

    @property
    def total_tokens(self) -> int:
        """Tokens written so far, both splits."""
        return sum(count["tokens"] for count in self.counts.values())

    def add(self, ids: list[int]) -> None:
        """Write one document to its split."""
        split = "valid" if self.seen % self.every == self.every - 1 else "train"
        self.seen += 1
        self._builders[split].add_document(np.array(ids, dtype=self.dtype), [len(ids)])
        self.counts[split]["documents"] += 1
        self.counts[split]["tokens"] += len(ids)

    def close(self) -> None:
        """Write the indexes and close all files."""
        for split, path in self._paths.items():
            self._builders[split].finalize(f"{path}.idx")


def _check_splits(
    writer: _SplitWriter, report: text_source.ReadReport, min_tokens: int, prefix: Path
) -> None:
    for split, count in writer.counts.items():
        if count["documents"] == 0 or count["tokens"] < min_tokens:
            left_out = f", {report.problems[0]}" if report.problems else ""
            more = ", smaller document_chars, or a larger valid_fraction"
            raise DataError(
                f"output_prefix={prefix}: the {split} split has {count['documents']} documents, "
                f"{count['tokens']} tokens (at least {min_tokens} needed) from {report.documents} "
                f"documents, {report.files} files{left_out}. Give more text"
                f"{more if split == 'valid' else ''}."
            )
