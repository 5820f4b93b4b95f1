"""The bigram loss against values worked by hand."""

import json
import math

import numpy as np
import pytest
import torch

from megatron_bitcpm.evaluation import bigram
from megatron_bitcpm.evaluation.bigram import BigramModel, bigram_loss


def test_probabilities_by_hand():
    # pairs of 0 1 0 1 0 2 1: 01 twice, 10 twice, 02 once, 21 once; counts 3 3 1, N = 7, V = 4
    model = BigramModel(np.array([0, 1, 0, 1, 0, 2, 1], np.uint16), vocab_size=4)
    unigram = [4 / 11, 4 / 11, 2 / 11, 1 / 11]
    # after 0: three pairs, two kinds; D = 0.75
    expected_0 = [
        0 + 0.75 * 2 / 3 * unigram[0],
        (2 - 0.75) / 3 + 0.75 * 2 / 3 * unigram[1],
        (1 - 0.75) / 3 + 0.75 * 2 / 3 * unigram[2],
        0 + 0.75 * 2 / 3 * unigram[3],
    ]
    # after 1: two pairs, one kind; the last 1 has no follower
    expected_1 = [(2 - 0.75) / 2 + 0.75 / 2 * unigram[0], *(0.375 * u for u in unigram[1:])]
    expected = np.array([expected_0, expected_1])
    context, label = np.meshgrid([0, 1], range(4), indexing="ij")
    np.testing.assert_allclose(model.probability(context, label), expected, rtol=1e-12)
    # 3 was never seen
    np.testing.assert_allclose(model.probability(np.full(4, 3), np.arange(4)), unigram, rtol=1e-12)


@pytest.mark.parametrize("chunk", [3, 7, 100, 1 << 22])
def test_probabilities_sum_to_one_and_chunks_do_not_matter(monkeypatch, chunk):
    tokens = np.random.default_rng(0).zipf(1.5, 1000).clip(max=30).astype(np.uint16)
    context, label = np.meshgrid(range(32), range(32), indexing="ij")
    whole = BigramModel(tokens, 32).probability(context, label)
    monkeypatch.setattr(bigram, "_CHUNK_TOKENS", chunk)
    parts = BigramModel(tokens, 32).probability(context, label)
    assert np.array_equal(whole, parts)
    np.testing.assert_allclose(parts.sum(1), 1, rtol=1e-12)
    # the pairs once more, with a loop
    pairs = {}
    for pair in zip(tokens.tolist(), tokens.tolist()[1:], strict=False):
        pairs[pair] = pairs.get(pair, 0) + 1
    (a, b), count = max(pairs.items(), key=lambda item: item[1])
    total = sum(n for (first, _), n in pairs.items() if first == a)
    kinds = sum(first == a for first, _ in pairs)
    unigram = (tokens.tolist().count(b) + 1) / (1000 + 32)
    assert parts[a, b] == pytest.approx((count - 0.75 + 0.75 * kinds * unigram) / total)


def test_loss_counts_exactly_the_unmasked_labels(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d_train.bin"), dtype=np.uint16)
    # the two documents' pairs are those of 0 1 0 1 0 2 1 above, the pair between them included
    builder.add_document(np.array([0, 1, 0]), [3])
    builder.add_document(np.array([1, 0, 2, 1]), [4])
    builder.finalize(str(tmp_path / "d_train.idx"))
    samples = [
        {
            "tokens": torch.tensor([0, 1, 3]),
            "labels": torch.tensor([1, 0, 3]),
            "loss_mask": torch.tensor([1.0, 1.0, 1.0]),
        },
        {
            "tokens": torch.tensor([0, 2, 2]),
            "labels": torch.tensor([2, 3, 3]),
            "loss_mask": torch.tensor([1.0, 0.0, 0.0]),
        },
    ]
    probabilities = [
        1.25 / 3 + 0.5 * 4 / 11,
        1.25 / 2 + 0.375 * 4 / 11,
        1 / 11,
        0.25 / 3 + 0.5 * 2 / 11,
    ]
    expected = -sum(map(math.log, probabilities)) / 4
    loss = bigram_loss(tmp_path / "d_train", samples, 4)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert bigram_loss(tmp_path / "d_train", iter(samples), 4) == loss


def test_on_a_dataset_a_predictable_text_beats_a_random_one(tmp_path):
    from megatron_bitcpm.config import DataConfig
    from megatron_bitcpm.data.dataset import build_valid_datasets
    from megatron_bitcpm.data.prepare import prepare
    from megatron_bitcpm.data.tokenizer import load_tokenizer
    from megatron_bitcpm.data.tokenizer_train import train_tokenizer

    rng = np.random.default_rng(0)
    losses = {}
    for name in ("cycle", "random"):
        letters = (np.arange(60) if name == "cycle" else rng.integers(0, 26, 60 * 300)) % 26
        text = "".join(chr(97 + i) for i in letters)
        rows = [text] * 300 if name == "cycle" else [text[i : i + 60] for i in range(0, 18000, 60)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        if name == "cycle":
            # the letters as they are: one piece each
            train_tokenizer([path], tmp_path / "tok", vocab_size=300, character_coverage=1.0)
        prefix = tmp_path / name
        prepare([path], tmp_path / "tok", prefix, show_progress=False)
        tokenizer = load_tokenizer(tmp_path / "tok")
        data = DataConfig(prefix=str(prefix), tokenizer=str(tmp_path / "tok"), seq_length=32)
        valid = build_valid_datasets(data, 1, tokenizer)["valid"]
        windows = map(valid.__getitem__, range(len(valid)))
        losses[name] = bigram_loss(f"{prefix}_train", windows, tokenizer.vocab_size)
    assert losses["cycle"] < 0.3
    # 26 equally likely letters, one end token in 61
    assert 2.9 < losses["random"] < 3.6
