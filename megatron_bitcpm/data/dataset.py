"""Training and validation samples of a run: checked, blended, and in what order.

A sample is a window of seq_length + 1 tokens over one shuffled epoch of concatenated documents.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_bitcpm.config import DataConfig
from megatron_bitcpm.data.blend import Blend
from megatron_bitcpm.data.documents import add_document_fields
from megatron_bitcpm.data.index_cache import fail_on_all_ranks, open_gpt_dataset
from megatron_bitcpm.data.indexed import IndexedFiles
from megatron_bitcpm.data.sets import check_train_sets, check_valid_sets
from megatron_bitcpm.data.tokenizer import TextTokenizer
from megatron_bitcpm.errors import DataError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

logger = logging.getLogger(__name__)

VALIDATION_SEED = 1234
"""Order of the validation windows; not the run's seed, so that runs can be compared."""


def build_train_dataset(
    data: DataConfig, num_samples: int, seed: int, tokenizer: TextTokenizer
) -> TrainDataset:
    """Check and open ``<prefix>_train`` of every training set and blend them by weight.

    With torch.distributed this is collective: rank 0 writes index caches, and a DataError of one
    rank is raised on all. `num_samples`, what the run will read, only decides the logged epochs.
    """
    with fail_on_all_ranks():
        checked = check_train_sets(data, tokenizer)
    windows = [Windows(data, files, True, seed, tokenizer) for files in checked.values()]
    dataset = TrainDataset(windows, [entry.weight for entry in data.train_sets], seed)
    for key, epochs in zip(checked, dataset.epochs(num_samples), strict=True):
        logger.info("%s=%s: %.3g epochs", key, checked[key].prefix, epochs)
    return dataset


def build_valid_datasets(
    data: DataConfig, num_samples: int, tokenizer: TextTokenizer
) -> dict[str, Windows]:
    """Open the first `num_samples` windows of ``<prefix>_valid`` of every validation set, by name.

    Their order is decided by the files and seq_length alone. Collective like training.
    """
    with fail_on_all_ranks():
        checked = check_valid_sets(data, num_samples, tokenizer)
    return {
        name: Windows(data, files, False, VALIDATION_SEED, tokenizer)
        for name, files in checked.items()
    }


class Windows:
    """One shuffled epoch of a checked split, as samples.

    A sample is a dict of tokens, labels, position_ids [S] int64 and loss_mask [S] float32, and
    with ``data.reset_attention_mask`` document_start [S] int64; see `documents`.
    """

    def __init__(
        self,
        data: DataConfig,
        files: IndexedFiles,
        is_train: bool,
        seed: int,
        tokenizer: TextTokenizer,
    ) -> None:
        # beside the data: <prefix>_cache for <prefix>_train and <prefix>_valid
        root = Path(
            data.cache or files.prefix.removesuffix("_train").removesuffix("_valid") + "_cache"
        )
        self.stock: GPTDataset = open_gpt_dataset(
            files, is_train, data.seq_length, seed, tokenizer, root
        )
        self._data, self._eod = data, tokenizer.eod

    def __len__(self) -> int:
        return len(self.stock)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.stock[index]
        return add_document_fields(
            sample["tokens"],
            sample["labels"],
            self._eod,
            reset_attention_mask=self._data.reset_attention_mask,
            reset_position_ids=self._data.reset_position_ids,
            eod_mask_loss=self._data.eod_mask_loss,
        )


class TrainDataset:
    """The samples of a run, blended by weight; they never end.

    Sample i depends on i, the seed, the files and the weights: not on the ranks, and not on how
    many samples a run reads. Each set is read from its beginning to its end and then again, the
    windows of each further epoch in a new order.
    """

    def __init__(self, sets: list[Windows], weights: list[float], seed: int) -> None:
        self.sets = sets
        self.blend = Blend(weights)
        self.seed = seed
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        which, number = self.blend.locate(index)
        epoch, window = divmod(number, len(self.sets[which]))
        return self.sets[which][self._shuffled(which, epoch, window)]

    def epochs(self, num_samples: int) -> list[float]:
        """Return how often the first num_samples samples read each set."""
        counts = self.blend.counts(num_samples)
        return [count / len(windows) for count, windows in zip(counts, self.sets, strict=True)]

    def _shuffled(self, which: int, epoch: int, window: int) -> int:
        """The first epoch is in the order of the index, which is shuffled already."""
        if epoch == 0:
            return window
        if self._orders.get(which, (0,))[0] != epoch:
            # RandomState, because its numbers are the same in all versions of numpy.
            random = np.random.RandomState([self.seed, epoch])
            order = random.permutation(len(self.sets[which])).astype(np.uint32)
            self._orders[which] = (epoch, order)
        return int(self._orders[which][1][window])


@dataclass
class MicroBatchIterator:
    """Micro-batches of one data-parallel rank, in an order that resumes exactly; never ends.

    A global batch is the samples [c, c + global_batch_size) of the dataset, c = samples consumed so
    far, whatever the number of ranks. As in Megatron's own sampler, micro-batch m of rank r holds
    the contiguous samples from ``c + (m * dp_size + r) * micro_batch_size``. A dataset with a
    length begins again after its last sample; a TrainDataset has none and goes on by itself.
    Yields dicts of the samples' tensors, [B, S], on the CPU, see `Windows`.
    """

    dataset: Any
    consumed_samples: int
    micro_batch_size: int
    global_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        batch, parts = self.global_batch_size, self.micro_batch_size * self.dp_size
        if self.micro_batch_size < 1 or batch % parts != 0:
            raise DataError(
                f"global_batch_size={batch}: not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x data parallel {self.dp_size}. Change one of them."
            )
        if self.consumed_samples < 0:
            raise DataError(
                f"consumed_samples={self.consumed_samples}: is negative. Give 0 or more."
            )
        assert 0 <= self.dp_rank < self.dp_size
        self._length = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        self._offset = 0

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches this rank gets of one global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        place = self._offset * self.dp_size + self.dp_rank
        first = self.consumed_samples + place * self.micro_batch_size
        samples = [self._sample(i) for i in range(first, first + self.micro_batch_size)]
        self._offset += 1
        if self._offset == self.micro_batches_per_step:
            self._offset = 0
            self.consumed_samples += self.global_batch_size
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def _sample(self, index: int) -> dict[str, torch.Tensor]:
        at = index if self._length is None else index % self._length
        sample: dict[str, torch.Tensor] = self.dataset[at]
        return sample
