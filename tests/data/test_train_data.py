"""Blended training data: order over ranks, epochs and run lengths; long sequences; errors."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks

from megatron_bitcpm.config import DataConfig
from megatron_bitcpm.data.dataset import MicroBatchIterator, build_train_dataset
from megatron_bitcpm.data.tokenizer import TextTokenizer
from megatron_bitcpm.errors import DataError
from megatron_bitcpm.patching.versions import megatron_version

EOD = 2
pytestmark = pytest.mark.both_versions


@pytest.fixture
def blend(write_windows, data_config):
    """Two sets, 10 windows numbered from 1000 with weight 3 and 7 from 2000 with weight 1."""
    entries = [
        {"prefix": write_windows("a", 1000, 10), "weight": 3},
        {"prefix": write_windows("b", 2000, 7), "weight": 1},
    ]
    return data_config(blend=entries)


def first_tokens(dataset, count, start=0):
    """What each window begins with, which no other window of its set does."""
    return [int(dataset[i]["tokens"][0]) for i in range(start, start + count)]


def test_proportions_and_epochs(blend, tokenizer):
    dataset = build_train_dataset(blend, 80, 5, tokenizer)
    seen = [[n for n in first_tokens(dataset, 80) if n // 1000 == k] for k in (1, 2)]
    assert [len(part) for part in seen] == [60, 20]
    assert dataset.epochs(80) == [60 / 10, 20 / 7]
    one_epoch = Counter(seen[0][:10])
    for epoch in range(6):
        assert Counter(seen[0][10 * epoch : 10 * epoch + 10]) == one_epoch
    assert Counter(seen[1][7:14]) == Counter(seen[1][:7])
    # each epoch in an order of its own
    assert len({tuple(seen[0][10 * e : 10 * e + 10]) for e in range(6)}) == 6


def test_the_seed_decides_how_later_epochs_follow(write_windows, data_config, tokenizer):
    data = data_config(prefix=write_windows("a", 1000, 10))
    moves = set()
    for seed in (5, 6):
        order = first_tokens(build_train_dataset(data, 8, seed, tokenizer), 20)
        moves.add(tuple(order[10:].index(n) for n in order[:10]))
    assert len(moves) == 2


def test_a_set_alone_and_in_a_blend_is_read_in_the_same_order(blend, data_config, tokenizer):
    mixed = first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80)
    alone = data_config(prefix=blend.blend[0].prefix)
    wanted = first_tokens(build_train_dataset(alone, 60, 5, tokenizer), 60)
    assert [n for n in mixed if n < 2000] == wanted


def test_order_depends_on_the_seed_and_not_on_the_length_of_the_run(blend, tokenizer):
    order = first_tokens(build_train_dataset(blend, 8, 5, tokenizer), 300)
    assert order == first_tokens(build_train_dataset(blend, 3000, 5, tokenizer), 300)
    other = first_tokens(build_train_dataset(blend, 8, 6, tokenizer), 300)
    assert order != other
    # the seed decides which windows, the weights which set
    assert [n // 1000 for n in order] == [n // 1000 for n in other]


def test_the_first_epoch_is_stock_megatrons(write_split, data_config, tokenizer):
    """Against a dataset that Megatron's own builder makes."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    random = np.random.default_rng(0)
    documents = [[*random.integers(3, 900, n), EOD] for n in random.integers(1, 40, 60)]
    prefix = write_split("d", documents)
    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=16,
        blend_per_split=[([f"{prefix}_train"], None), None, None],
        path_to_cache=f"{prefix}_stock",
        tokenizer=tokenizer,
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    stock = BlendedMegatronDatasetBuilder(GPTDataset, [9, 0, 0], lambda: True, config).build()[0]
    ours = build_train_dataset(data_config(prefix=prefix, seq_length=16), 9, 5, tokenizer)
    assert len(stock) == len(ours.sets[0]) > 60
    for index in range(len(stock)):
        for key in ("tokens", "labels", "position_ids", "loss_mask"):
            assert torch.equal(stock[index][key], ours[index][key])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_global_batches_are_the_same_on_any_number_of_ranks(blend, tokenizer, size):
    dataset = build_train_dataset(blend, 80, 5, tokenizer)
    ranks = [MicroBatchIterator(dataset, 16, 2, 8, rank, size) for rank in range(size)]
    got = []
    for _ in range(10 * ranks[0].micro_batches_per_step):
        for rank in ranks:
            got += next(rank)["tokens"][:, 0].tolist()
    assert got == first_tokens(dataset, 80, 16)


def build_on_rank(rank: int, data: DataConfig, sha256: str, damage: str | None = None):
    from megatron_bitcpm.data import index_cache

    tokenizer = TextTokenizer.__new__(TextTokenizer)
    vars(tokenizer).update(folder=Path("plain"), sha256=sha256, vocab_size=50_000, eos_id=EOD)
    if damage == "rank 1 misses a file" and rank == 1:
        data = data.model_copy(
            update={
                "blend": (data.blend[0], data.blend[1].model_copy(update={"prefix": "elsewhere/b"}))
            }
        )
    if damage == "rank 1 does not see the cache" and rank == 1:
        index_cache._is_complete = lambda folder: False
    if damage == "rank 0 cannot write" and rank == 0:

        def no_space(*args):
            raise OSError(28, "No space left on device")

        os.rename = no_space
    try:
        return first_tokens(build_train_dataset(data, 80, 5, tokenizer), 80)
    except DataError as error:
        return str(error)


def test_ranks_build_at_once_what_one_builds(blend, tokenizer):
    together = run_ranks(2, build_on_rank, blend, tokenizer.sha256)
    for entry in blend.blend:
        shutil.rmtree(f"{entry.prefix}_cache")
    assert together == [first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80)] * 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("rank 1 misses a file", "data.blend.1.prefix=elsewhere/b_train.idx: no such file"),
        ("rank 1 does not see the cache", "this rank does not see it"),
        ("rank 0 cannot write", "the index cache cannot be written (No space left on device)"),
    ],
)
def test_an_error_of_one_rank_stops_all(blend, tokenizer, damage, message):
    answers = run_ranks(2, build_on_rank, blend, tokenizer.sha256, damage)
    assert all(message in answer and "\n" not in answer for answer in answers)
    assert sum(answer.startswith("rank ") for answer in answers) == 1


def test_32k_sequences(write_split, data_config, tokenizer):
    """Build, read and check every number of a long sample against a loop."""
    seq_length = 32_768
    random = np.random.default_rng(1)
    documents = [[*random.integers(3, 50_000, n - 1), EOD] for n in random.integers(1, 30_000, 25)]
    prefix = write_split("long", documents)
    data = data_config(
        prefix=prefix,
        seq_length=seq_length,
        reset_attention_mask=True,
        reset_position_ids=True,
        eod_mask_loss=True,
    )
    dataset = build_train_dataset(data, 4, 1, tokenizer)
    assert len(dataset.sets[0]) == (sum(map(len, documents)) - 1) // seq_length
    batch = next(MicroBatchIterator(dataset, 0, 2, 4))
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("tokens", "labels", "position_ids", "loss_mask", "document_start"), (2, seq_length)
    )
    stock = dataset.sets[0].stock
    stream = np.concatenate([documents[i] for i in stock.document_index])
    for row in range(2):
        begin = int(stock.shuffle_index[row]) * seq_length
        window = stream[begin : begin + seq_length + 1].tolist()
        starts, start = [], 0
        for t, token in enumerate(window[:-1]):
            starts.append(start)
            start = t + 1 if token == EOD else start
        assert batch["tokens"][row].tolist() == window[:-1]
        assert batch["labels"][row].tolist() == window[1:]
        assert batch["document_start"][row].tolist() == starts
        assert batch["position_ids"][row].tolist() == [t - s for t, s in enumerate(starts)]
        assert batch["loss_mask"][row].tolist() == [float(token != EOD) for token in window[:-1]]
        assert len(set(starts)) > 1


def test_samples_share_no_memory(write_windows, data_config, tokenizer):
    """What a consumer writes into a sample must not come back in the next one."""
    dataset = build_train_dataset(data_config(prefix=write_windows("a", 5, 6)), 4, 1, tokenizer)
    for key, value in dataset[0].items():
        wanted = dataset[1][key].clone()
        value.fill_(0)
        assert torch.equal(dataset[1][key], wanted)


@pytest.mark.parametrize("guarded", [True, False])
def test_the_pad_id_never_occurs(write_split, data_config, tokenizer, monkeypatch, guarded):
    """With pad == end of document, megatron-core 0.12 takes labels away; -1 prevents that."""
    documents = [[10 + n, 11 + n, EOD] for n in range(40)]
    if not guarded:
        monkeypatch.setattr(TextTokenizer, "pad", EOD)
    data = data_config(prefix=write_split("d", documents), seq_length=8)
    dataset = build_train_dataset(data, 60, 1, tokenizer)
    stock = dataset.sets[0].stock
    stock_counts = [float(stock[i % len(stock)]["loss_mask"].sum()) for i in range(60)]
    samples = [dataset[i] for i in range(60)]
    ends = {int((sample["labels"] == EOD).sum()) for sample in samples}
    assert all(sample["loss_mask"].sum() == 8 for sample in samples)
    if guarded or megatron_version() >= (0, 16):  # the newer release sees to it itself
        assert ends == {2, 3}  # every third of 8
        assert stock_counts == [8.0] * 60
    else:
        assert ends == {0}
        # the mask that stock keeps was edited again and again
        assert stock_counts[0] > stock_counts[-1] == 0


def test_cut_caches_are_rebuilt(blend, tokenizer):
    wanted = first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80)
    caches = [p for e in blend.blend for p in Path(f"{e.prefix}_cache").rglob("*.npy")]
    assert len(caches) == 6
    for path in caches:
        os.truncate(path, path.stat().st_size - 3)
    assert first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80) == wanted
    caches[0].unlink()
    assert first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80) == wanted
    # nothing but the finished folder stays
    assert len(list(Path(f"{blend.blend[0].prefix}_cache").iterdir())) == 1


def test_a_run_that_builds_the_same_cache_meanwhile_is_no_error(blend, tokenizer, monkeypatch):
    rename = os.rename

    def too_late(source, target):
        shutil.copytree(source, target)  # the other run was a moment faster
        rename(source, target)

    monkeypatch.setattr(os, "rename", too_late)
    order = first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80)
    monkeypatch.undo()
    assert order == first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80)
    assert len(list(Path(f"{blend.blend[0].prefix}_cache").iterdir())) == 1


def test_a_finished_cache_needs_no_writable_folder(blend, tokenizer, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    order = first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80)
    monkeypatch.setattr(os, "mkdir", read_only)
    assert first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80) == order
    with pytest.raises(DataError, match=r"data\.cache=.*a_cache: the index cache cannot be ") as e:
        build_train_dataset(blend, 80, 6, tokenizer)
    assert "(Read-only file system). Set data.cache to a writable" in str(e.value)


def test_moved_data_finds_its_cache(blend, tokenizer, tmp_path, monkeypatch):
    order = first_tokens(build_train_dataset(blend, 80, 5, tokenizer), 80)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in list(tmp_path.glob("[ab]_*")):
        shutil.move(path, moved)
    files = sorted(moved.rglob("*"))
    tree = blend.model_dump()
    for entry in tree["blend"]:
        entry["prefix"] = str(moved / Path(entry["prefix"]).name)
    monkeypatch.setattr(os, "mkdir", None)  # no cache is written
    assert first_tokens(build_train_dataset(DataConfig(**tree), 80, 5, tokenizer), 80) == order
    assert sorted(moved.rglob("*")) == files
