"""Stock GPTDataset over one split, its shuffled indexes kept in a folder that is whole or absent.

Megatron writes its index files in place: another run may read half of one, and a rank that cannot
write leaves the others waiting. Here rank 0 builds in a hidden folder and renames it, all ranks
hear whether that worked, and then all read.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_bitcpm.data.indexed import IndexedFiles
from megatron_bitcpm.data.tokenizer import TextTokenizer
from megatron_bitcpm.errors import DataError
from megatron_bitcpm.patching.versions import megatron_version
from megatron_bitcpm.publish import replace_folder, scratch_beside

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

_INDEXES = ("document_index", "sample_index", "shuffle_index")


@contextmanager
def fail_on_all_ranks() -> Iterator[None]:
    """Run a block on every rank; a DataError of one is raised on all. Collective if distributed."""
    own: DataError | None = None
    try:
        yield
    except DataError as error:
        own = error
    messages: list[str | None] = [str(own) if own else None]
    if _is_distributed():
        messages = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(messages, str(own) if own else None)
    if own is not None:
        raise own
    for rank, message in enumerate(messages):
        if message is not None:
            raise DataError(f"rank {rank}: {message}")


def open_gpt_dataset(
    files: IndexedFiles,
    is_train: bool,
    seq_length: int,
    seed: int,
    tokenizer: TextTokenizer,
    cache_root: Path,
) -> GPTDataset:
    """Return one epoch of a split as a stock GPTDataset, from the index cache, built if absent.

    Collective when torch.distributed is initialised. The cache's name holds everything the indexes
    depend on, among it the contents of the data but not its place: data prepared again never meets
    old indexes, and moved data finds its own.
    """
    parts = (files.fingerprint, seq_length, seed, tokenizer.sha256, *megatron_version())
    digest = hashlib.sha256("-".join(map(str, parts)).encode()).hexdigest()[:16]
    folder = cache_root / f"{'train' if is_train else 'valid'}-{digest}"

    stock = functools.partial(_stock_dataset, files, is_train, seq_length, seed, tokenizer)
    with fail_on_all_ranks():
        if _is_main_rank() and not _is_complete(folder):
            _build(folder, stock)
    with fail_on_all_ranks():
        if not _is_complete(folder):
            raise DataError(
                f"data.cache={folder}: rank 0 wrote it and this rank does not see it. Give a "
                "folder on a file system that all ranks share."
            )
    return stock(folder)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_main_rank() -> bool:
    return not _is_distributed() or torch.distributed.get_rank() == 0


def _is_complete(folder: Path) -> bool:
    """Whether all indexes are there and none is cut; Megatron would fail on them, not rebuild."""
    for name in _INDEXES:
        found = list(folder.glob(f"*-{name}.npy"))
        if len(found) != 1:
            return False
        try:
            np.load(found[0], mmap_mode="r")
        except (ValueError, EOFError, OSError):
            return False
    return True


def _build(folder: Path, stock: Any) -> None:
    """Make the index folder, unless another run was faster."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(folder) as scratch:
            stock(scratch)
            if not _is_complete(folder):
                replace_folder(scratch, folder)
    except OSError as error:
        if not _is_complete(folder):
            raise DataError(
                f"data.cache={folder.parent}: the index cache cannot be written "
                f"({error.strerror or error}). Set data.cache to a writable folder with free space."
            ) from error


def _stock_dataset(
    files: IndexedFiles,
    is_train: bool,
    seq_length: int,
    seed: int,
    tokenizer: TextTokenizer,
    cache: Path,
) -> GPTDataset:
    # imported late: Megatron takes two seconds
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    split = Split.train if is_train else Split.valid
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[([files.prefix], None) if s is split else None for s in Split],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        # `documents` does these: stock edits a mask it keeps and builds S x S numbers.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(files.prefix)
    documents = np.arange(len(files.sequence_lengths), dtype=np.int32)
    # The second argument only enters the names of the cache files, which must not know the place.
    return GPTDataset(indexed, files.fingerprint, documents, None, split, config)
