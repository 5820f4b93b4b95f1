"""The loss of a bigram model: what a language model must beat to have learnt more than pairs.

Absolute discounting, interpolated with the unigram model (Ney, Essen and Kneser 1994; Chen and
Goodman 1999, section 2.4), with c the counts in the train split, N its tokens, V the vocabulary:

    p(b | a) = max(c(a b) - D, 0) / c(a .) + D * n(a) / c(a .) * u(b)
    u(b)     = (c(b) + 1) / (N + V)

n(a) is the number of different tokens seen after a; an `a` never seen gives u(b). D = 0.75, the
customary constant, and add-one for the unigram: neither is fitted to the validation split.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megatron_bitcpm.data.indexed import check_indexed_files, check_token_range
from megatron_bitcpm.errors import DataError

DISCOUNT = 0.75  # D above, in counts
_CHUNK_TOKENS = 1 << 22


class BigramModel:
    """Counts and probabilities of a training text: ids in [0, V), 1-D, read in chunks.

    Only pairs that occur are stored: V = 73448 would need 43 GB for a full table.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        unigrams = np.zeros(vocab_size, np.int64)
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            # one token more than the chunk, so that the pair across its end counts too
            part = np.asarray(tokens[start : start + _CHUNK_TOKENS + 1]).astype(np.int64)
            unigrams += np.bincount(part[:_CHUNK_TOKENS], minlength=vocab_size)
            keys, counts = np.unique(part[:-1] * vocab_size + part[1:], return_counts=True)
            # Merge them into the sorted table.
            self._keys, where = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
            total = np.zeros(len(self._keys), np.int64)
            np.add.at(total, where, np.concatenate([self._counts, counts]))
            self._counts = total
        first = self._keys // vocab_size
        self._context_counts = np.bincount(first, weights=self._counts, minlength=vocab_size)
        self._followers = np.bincount(first, minlength=vocab_size)
        self._unigram = (unigrams + 1) / (len(tokens) + vocab_size)

    def probability(self, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return p(label | token), float64, same shape as the two id arrays."""
        tokens, labels = tokens.astype(np.int64), labels.astype(np.int64)
        unigram = self._unigram[labels]
        context = self._context_counts[tokens]
        if len(self._keys) == 0:
            return unigram
        keys = tokens * self.vocab_size + labels
        where = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        pairs = np.where(self._keys[where] == keys, self._counts[where], 0)
        smoothed = np.maximum(pairs - DISCOUNT, 0) + DISCOUNT * self._followers[tokens] * unigram
        return np.where(context > 0, smoothed / np.maximum(context, 1), unigram)


def bigram_loss(
    train_prefix: str | os.PathLike[str], samples: Iterable[Mapping[str, Any]], vocab_size: int
) -> float:
    """Return the mean loss of a bigram model on validation samples, in nats a token.

    It is fitted to the indexed dataset ``<train_prefix>.bin``: the end token and the next
    document's first one are a pair too. Samples are windows or micro-batches: tokens, labels and
    loss_mask of one shape. Exactly the labels with mask > 0 count, weighted by it.
    """
    files = check_indexed_files(train_prefix)
    check_token_range(files, vocab_size)
    model = BigramModel(files.tokens(), vocab_size)
    losses: list[float] = []
    weights: list[float] = []
    for sample in samples:
        tokens, labels, mask = (
            np.asarray(sample[key]) for key in ("tokens", "labels", "loss_mask")
        )
        used = mask > 0
        nats = -np.log(model.probability(tokens[used], labels[used]))
        losses.append(float((nats * mask[used]).sum(dtype=np.float64)))
        weights.append(float(mask[used].sum(dtype=np.float64)))
    if not weights or sum(weights) == 0:
        raise DataError(f"samples={len(weights)}: no label to predict. Give whole windows.")
    return math.fsum(losses) / math.fsum(weights)
