"""Small sets of known tokens, written by Megatron, without text or a trained tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_bitcpm.config import DataConfig
from megatron_bitcpm.data.tokenizer import TextTokenizer

EOD = 2
VOCAB = 50_000


class PlainTokenizer(TextTokenizer):
    """What datasets need of a tokenizer, with no files behind it."""

    def __init__(self, sha256: str = "0" * 64) -> None:
        self.folder = Path("plain")
        self.sha256 = sha256
        self.vocab_size = VOCAB
        self.bos_id, self.eos_id = 1, EOD


@pytest.fixture
def tokenizer() -> PlainTokenizer:
    return PlainTokenizer()


@pytest.fixture
def write_split(tmp_path) -> Callable[..., str]:
    """Return write(name, documents, split="train"), which returns the prefix of the set."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def write(name: str, documents: Sequence[Sequence[int]], split: str = "train") -> str:
        prefix = tmp_path / name
        builder = IndexedDatasetBuilder(f"{prefix}_{split}.bin", dtype=np.uint16)
        for document in documents:
            builder.add_document(np.array(document, np.uint16), [len(document)])
        builder.finalize(f"{prefix}_{split}.idx")
        return str(prefix)

    return write


@pytest.fixture
def write_windows(write_split) -> Callable[..., str]:
    """Return write(name, first, count, S): documents of S tokens, the n-th all first + n.

    One more token makes `count` windows. Shuffled, it may stand anywhere and shift the cuts after
    it, but every window begins with another token.
    """

    def write(name: str, first: int, count: int, seq_length: int = 4, split: str = "train") -> str:
        windows = [[first + n] * seq_length for n in range(count)] + [[first + count]]
        return write_split(name, windows, split)

    return write


@pytest.fixture
def data_config(tmp_path) -> Callable[..., DataConfig]:
    def make(**fields) -> DataConfig:
        return DataConfig(**{"tokenizer": "plain", "seq_length": 4, **fields})

    return make
