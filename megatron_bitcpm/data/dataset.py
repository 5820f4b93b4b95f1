"""Training and validation samples: stock megatron.core GPTDataset, checked first, and their order.

A sample is a window of seq_length + 1 tokens over the shuffled, concatenated documents; documents
are not separated by attention or positions, only by the end-of-sequence token, and every token
counts in the loss.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_bitcpm.data.indexed import (
    IndexedFiles,
    check_indexed_files,
    check_token_range,
    manifest_path,
    read_manifest,
)
from megatron_bitcpm.data.tokenizer import TextTokenizer
from megatron_bitcpm.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

VALIDATION_SEED = 1234
"""Order of the validation windows; not the run's seed, so that runs can be compared."""


def build_train_valid_datasets(
    data_prefix: str,
    seq_length: int,
    train_samples: int,
    valid_samples: int | None,
    seed: int,
    tokenizer: TextTokenizer,
    cache_dir: str | None = None,
) -> tuple[GPTDataset, GPTDataset]:
    """Build both splits of `<data_prefix>_{train,valid}.{bin,idx}`, on every rank.

    With torch.distributed initialised this is collective: all ranks must call it, rank 0 writes the
    index caches. All ranks check the files themselves, so all raise or none.

    The order of training samples depends on seed, seq_length, the documents and, beyond one epoch,
    on train_samples: a resumed run must pass the train_samples it began with.

    Args:
        data_prefix: the prefix given to `prepare`.
        seq_length: tokens a sample, S.
        train_samples: samples the whole run will consume; the split is repeated as needed.
        valid_samples: validation windows needed, None for all. The dataset holds all of them in an
            order that no argument but seq_length changes: evaluate on its first valid_samples.
        seed: order of documents and windows of the train split.
        tokenizer: the tokenizer of the run, see `tokenizer.load_tokenizer`.
        cache_dir: folder for Megatron's index caches, default ``<data_prefix>_cache``. Each pair of
            datasets has a folder of its own in it, named by the hash of its indexes.
    Returns:
        (train, valid), each indexable to a dict of tokens, labels, position_ids [S] int64 and
        loss_mask [S] float32.
    Raises:
        DataError: missing, damaged or foreign files, another tokenizer, ids outside its vocabulary,
            a split shorter than one sample, or fewer validation windows than asked for.
    """
    if seq_length < 1 or train_samples < 1:
        raise DataError.of(
            "train_samples" if seq_length >= 1 else "seq_length",
            train_samples if seq_length >= 1 else seq_length,
            "must be positive",
            "Give 1 or more",
        )
    train, valid = check_data(data_prefix, seq_length, tokenizer)
    windows = (valid.num_tokens - 1) // seq_length
    if valid_samples is not None and not 1 <= valid_samples <= windows:
        raise DataError.of(
            "valid_samples",
            valid_samples,
            f"the valid split has {windows} windows of {seq_length} tokens",
            f"Use 1 to {windows}, or prepare with more text or a larger valid_fraction",
        )
    cache = Path(cache_dir or f"{data_prefix}_cache") / f"{train.fingerprint}-{valid.fingerprint}"
    _check_cache_folder(cache)
    _remove_broken_caches(cache)
    return (
        _build_split("train", train.prefix, seq_length, train_samples, seed, tokenizer, cache),
        # None: one epoch without repetition, whatever part of it is used
        _build_split("valid", valid.prefix, seq_length, None, VALIDATION_SEED, tokenizer, cache),
    )


def check_data(
    data_prefix: str, seq_length: int, tokenizer: TextTokenizer
) -> tuple[IndexedFiles, IndexedFiles]:
    """Check both splits and their manifest; return what their indexes say.

    Data without a manifest (written by Megatron's own tools) is accepted when every token id
    looked at is in the vocabulary.

    Raises:
        DataError: see `build_train_valid_datasets`.
    """
    manifest = read_manifest(data_prefix)
    if manifest is not None and manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise DataError.of(
            "tokenizer",
            tokenizer.folder,
            f"sha256 {tokenizer.sha256[:12]}..., {manifest_path(data_prefix)} was prepared with "
            f"{manifest['tokenizer_sha256'][:12]}...",
            "Use that tokenizer, or run prepare again",
        )
    splits = []
    for split in ("train", "valid"):
        files = check_indexed_files(f"{data_prefix}_{split}")
        if manifest is not None and files.num_tokens != manifest["splits"][split]["tokens"]:
            raise DataError.of(
                "data",
                f"{files.prefix}.idx",
                f"{files.num_tokens} tokens, the manifest says "
                f"{manifest['splits'][split]['tokens']}",
                "Run prepare again, or copy all five files from one run",
            )
        if files.num_tokens < seq_length + 1:
            raise DataError.of(
                "data",
                files.prefix,
                f"{files.num_tokens} tokens, one sample of seq_length {seq_length} needs "
                f"{seq_length + 1}",
                "Prepare more text, raise valid_fraction, or lower seq_length",
            )
        check_token_range(files, tokenizer.vocab_size)
        splits.append(files)
    return splits[0], splits[1]


def _build_split(
    split: str,
    prefix: str,
    seq_length: int,
    num_samples: int | None,
    seed: int,
    tokenizer: TextTokenizer,
    cache: Path,
) -> GPTDataset:
    # imported late: Megatron takes two seconds
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    blend = ([prefix], None)
    is_train = split == "train"
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[blend if is_train else None, None if is_train else blend, None],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [num_samples if is_train else 0, 0 if is_train else num_samples, 0]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
    return builder.build()[0 if is_train else 1]


def _check_cache_folder(folder: Path) -> None:
    """Make the folder on every rank: were only rank 0 to fail, the others would wait for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError.of(
            "cache_dir", folder, f"cannot be made ({error.strerror})", "Give a writable folder"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError.of("cache_dir", folder, "not writable", "Give a writable folder")


def _remove_broken_caches(folder: Path) -> None:
    """Delete index caches cut by an interrupted run; Megatron would fail on them, not rebuild."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        return
    for path in folder.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            path.unlink(missing_ok=True)


class MicroBatchIterator:
    """Micro-batches of one data-parallel rank, in an order that resumes exactly.

    A global batch is the samples [c, c + global_batch_size) of the dataset, c = samples consumed so
    far, whatever the number of ranks. As in Megatron's own sampler, micro-batch m of rank r holds
    the contiguous samples from ``c + (m * dp_size + r) * micro_batch_size``. Only whole global
    batches are given; iteration ends when the dataset has no further one.

    Args:
        dataset: a GPTDataset, or anything with len() and samples that are dicts of tensors.
        consumed_samples: samples of the dataset that earlier steps used up.
        micro_batch_size: samples a micro-batch, B.
        global_batch_size: samples a step over all ranks; a multiple of B * dp_size.
        dp_rank: data-parallel rank.
        dp_size: data-parallel ranks.
    Yields:
        dict(tokens, labels, position_ids [B, S] int64, loss_mask [B, S] float32), on the CPU.
    Raises:
        DataError: the batch sizes do not fit each other, or the start is outside the dataset.
    """

    def __init__(
        self,
        dataset: Any,
        consumed_samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        if micro_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size) != 0:
            raise DataError.of(
                "global_batch_size",
                global_batch_size,
                f"not a multiple of micro_batch_size {micro_batch_size} x data parallel {dp_size}",
                "Change one of them",
            )
        if not 0 <= consumed_samples <= len(dataset):
            raise DataError.of(
                "consumed_samples",
                consumed_samples,
                f"the dataset has {len(dataset)} samples",
                "Resume with the train_samples the run began with",
            )
        assert 0 <= dp_rank < dp_size
        self.dataset = dataset
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self._offset = 0

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches this rank gets of one global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self.consumed_samples + self.global_batch_size > len(self.dataset):
            raise StopIteration
        first = (
            self.consumed_samples
            + self._offset * self.dp_size * self.micro_batch_size
            + self.dp_rank * self.micro_batch_size
        )
        samples = [self.dataset[i] for i in range(first, first + self.micro_batch_size)]
        self._offset += 1
        if self._offset == self.micro_batches_per_step:
            self._offset = 0
            self.consumed_samples += self.global_batch_size
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
