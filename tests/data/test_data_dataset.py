"""Samples, their order, and refusal of damaged data."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bitcpm.config import DataConfig
from megatron_bitcpm.data.dataset import (
    MicroBatchIterator,
    build_train_dataset,
    build_valid_datasets,
)
from megatron_bitcpm.data.prepare import prepare
from megatron_bitcpm.data.tokenizer import load_tokenizer
from megatron_bitcpm.data.tokenizer_train import train_tokenizer
from megatron_bitcpm.errors import DataError

pytestmark = pytest.mark.both_versions
S = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with a tokenizer (`tok`) and prepared data (`d`)."""
    path = tmp_path_factory.mktemp("dataset")
    texts = [f"number {i} {'and ' * (i % 5)}on\n" for i in range(600)]
    (path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    train_tokenizer([path / "a.jsonl"], path / "tok", vocab_size=280 + 20)
    prepare([path / "a.jsonl"], path / "tok", path / "d", valid_fraction=0.1, show_progress=False)
    return path


@pytest.fixture
def data(source, tmp_path) -> Path:
    """A copy of the prepared data, to damage; returns its prefix."""
    for path in source.glob("d*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path / "d"


def build(prefix, tok, train_samples=40, valid_samples=8, seed=3, seq_length=S, cache=None):
    data = DataConfig(prefix=str(prefix), tokenizer=str(tok), seq_length=seq_length, cache=cache)
    tokenizer = load_tokenizer(tok)
    train = build_train_dataset(data, train_samples, seed, tokenizer)
    return train, build_valid_datasets(data, valid_samples, tokenizer)["valid"]


def tokens_of(dataset, count=40) -> torch.Tensor:
    return torch.stack([dataset[i]["tokens"] for i in range(count)])


def test_samples_are_windows_of_the_shuffled_documents(source, data):
    """One epoch, un-shuffled, is the documents in some order, cut every S tokens."""
    train = build(data, source / "tok")[0].sets[0]
    raw = np.fromfile(f"{data}_train.bin", np.uint16).astype(np.int64)
    documents = np.split(raw, np.flatnonzero(raw == 2)[:-1] + 1)
    stream = np.concatenate([documents[i] for i in train.stock.document_index])
    assert len(stream) == len(raw)
    assert len(train) == (len(raw) - 1) // S
    for index in range(len(train)):
        sample = train[index]
        start = int(train.stock.shuffle_index[index]) * S
        assert sample["tokens"].tolist() == stream[start : start + S].tolist()
        assert sample["labels"].tolist() == stream[start + 1 : start + S + 1].tolist()
        assert sample["position_ids"].tolist() == list(range(S))
        assert sample["loss_mask"].tolist() == [1.0] * S
        assert sorted(sample) == ["labels", "loss_mask", "position_ids", "tokens"]
    assert sorted(train.stock.shuffle_index.tolist()) == list(range(len(train)))


def test_every_label_counts_end_tokens_too_after_many_samples(source, data):
    """A pad id equal to eos makes megatron-core 0.12 drop ever more labels from the loss."""
    train, valid = build(data, source / "tok")
    for dataset in (train, valid):
        samples = [dataset[i] for i in range(len(valid))]
        masks = torch.stack([sample["loss_mask"] for sample in samples])
        labels = torch.stack([sample["labels"] for sample in samples])
        assert masks.eq(1).all()
        assert labels.eq(2).sum() > 10


def test_each_epoch_reads_every_window_once_in_another_order(source, data):
    train, _ = build(data, source / "tok")
    size = len(train.sets[0])
    epochs = [[tuple(train[e * size + i]["tokens"].tolist()) for i in range(size)] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_training_order_follows_the_seed_and_validation_does_not(source, data):
    train, valid = build(data, source / "tok", seed=3)
    again, _ = build(data, source / "tok", seed=3, cache=str(data) + "_elsewhere")
    other, other_valid = build(data, source / "tok", seed=4, valid_samples=1)
    assert torch.equal(tokens_of(train), tokens_of(again))
    assert not torch.equal(tokens_of(train), tokens_of(other))
    assert torch.equal(tokens_of(valid, len(valid)), tokens_of(other_valid, len(valid)))


def test_new_data_under_an_old_name_does_not_meet_old_caches(source, data):
    build(data, source / "tok")
    texts = [f"{'other ' * (i % 9)} {i}\n" for i in range(600)]
    corpus = data.parent / "b.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    prepare([corpus], source / "tok", data, overwrite=True, show_progress=False)
    stale, _ = build(data, source / "tok")
    fresh, _ = build(data, source / "tok", cache=str(data.parent / "new"))
    assert torch.equal(tokens_of(stale), tokens_of(fresh))


def test_cut_caches_are_rebuilt(source, data):
    train, _ = build(data, source / "tok")
    wanted = tokens_of(train).clone()
    del train
    caches = list(Path(f"{data}_cache").rglob("*.npy"))
    assert len(caches) == 6  # two splits, three each
    for path in caches:
        path.write_bytes(path.read_bytes()[:-3])
    assert torch.equal(tokens_of(build(data, source / "tok")[0]), wanted)


class Numbers:
    """A dataset whose sample i is the number i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return {"tokens": torch.tensor([index])}


def numbers(consumed, micro, total, rank, size, count=100) -> list[list[int]]:
    """The batches of all whole global batches of the dataset."""
    batches = MicroBatchIterator(Numbers(count), consumed, micro, total, rank, size)
    steps = (count - consumed) // total * batches.micro_batches_per_step
    return [next(batches)["tokens"].flatten().tolist() for _ in range(steps)]


def test_order_of_micro_batches_by_hand():
    assert numbers(0, 2, 8, 0, 2, count=17) == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert numbers(0, 2, 8, 1, 2, count=17) == [[2, 3], [6, 7], [10, 11], [14, 15]]


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 4), (2, 2), (3, 4), (4, 1), (4, 3)])
def test_global_batches_do_not_depend_on_the_ranks(size, micro):
    per_rank = [numbers(24, micro, 12, rank, size) for rank in range(size)]
    steps = 12 // (micro * size)
    for step in range((100 - 24) // 12):
        # micro-batch by micro-batch, rank after rank, is the order of the dataset
        got = [
            i
            for m in range(step * steps, (step + 1) * steps)
            for rank in range(size)
            for i in per_rank[rank][m]
        ]
        assert got == list(range(24 + 12 * step, 36 + 12 * step))
    assert {len(batches) for batches in per_rank} == {6 * steps}


def test_resume_continues_exactly(source, data):
    train, _ = build(data, source / "tok")
    batches = MicroBatchIterator(train, 0, 2, 8, 1, 2)
    whole = [next(batches)["tokens"] for _ in range(10)]
    first = MicroBatchIterator(train, 0, 2, 8, 1, 2)
    for _ in range(3 * first.micro_batches_per_step):
        next(first)
    assert first.consumed_samples == 24
    rebuilt, _ = build(data, source / "tok")
    batches = MicroBatchIterator(rebuilt, first.consumed_samples, 2, 8, 1, 2)
    rest = [next(batches)["tokens"] for _ in range(4)]
    assert torch.equal(torch.stack(whole[6:]), torch.stack(rest))
    assert rest[0].shape == (2, S)
    assert rest[0].dtype == torch.int64


def test_consumed_samples_grow_by_whole_steps():
    iterator = MicroBatchIterator(Numbers(20), 0, 2, 8, 0, 1)
    seen = []
    for _ in range(8):
        next(iterator)
        seen.append(iterator.consumed_samples)
    assert seen == [0, 0, 0, 8, 8, 8, 8, 16]


def test_reading_past_the_end_goes_on_at_the_beginning():
    iterator = MicroBatchIterator(Numbers(10), 6, 2, 4)
    got = [next(iterator)["tokens"].flatten().tolist() for _ in range(5)]
    assert got == [[6, 7], [8, 9], [0, 1], [2, 3], [4, 5]]
    odd = MicroBatchIterator(Numbers(3), 0, 2, 2)
    assert [next(odd)["tokens"].flatten().tolist() for _ in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_iterator_errors():
    with pytest.raises(DataError, match=r"global_batch_size=10: not a multiple of .* 4 x .* 2"):
        MicroBatchIterator(Numbers(20), 0, 4, 10, 0, 2)
    with pytest.raises(DataError, match="consumed_samples=-1: is negative"):
        MicroBatchIterator(Numbers(20), -1, 1, 1)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def patch(path: Path, offset: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


DAMAGE = {
    "index missing": (lambda p: Path(f"{p}.idx").unlink(), r"d_train\.idx: no such file"),
    "data missing": (lambda p: Path(f"{p}.bin").unlink(), r"d_train\.bin: no such file"),
    "index empty": (lambda p: cut(Path(f"{p}.idx"), 0), "cut off at 0 bytes"),
    "index header cut": (lambda p: cut(Path(f"{p}.idx"), 20), "cut off at 20 bytes"),
    "index cut": (lambda p: cut(Path(f"{p}.idx"), -1), r"bytes, its header says \d+"),
    "index too long": (
        lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes() + b"\0" * 540),
        r"bytes, its header says \d+",
    ),
    "bit in magic": (lambda p: patch(Path(f"{p}.idx"), 3, b"\x08"), "wrong magic"),
    "version": (lambda p: patch(Path(f"{p}.idx"), 9, b"\x02"), "wrong magic or version"),
    "float dtype": (lambda p: patch(Path(f"{p}.idx"), 17, b"\x07"), "dtype code 7"),
    "unknown dtype": (lambda p: patch(Path(f"{p}.idx"), 17, b"\x63"), "dtype code 99"),
    "other dtype": (lambda p: patch(Path(f"{p}.idx"), 17, b"\x04"), "contradict"),
    "huge count": (
        lambda p: patch(Path(f"{p}.idx"), 18, struct.pack("<Q", 2**62)),
        "its header says",
    ),
    "a length": (lambda p: patch(Path(f"{p}.idx"), 34 + 4 * 7, b"\x70"), "contradict"),
    "data cut": (lambda p: cut(Path(f"{p}.bin"), -2), r"d_train\.bin: \d+ bytes, its index says"),
    "data of the other split": (
        lambda p: shutil.copy(str(p).replace("train", "valid") + ".bin", f"{p}.bin"),
        r"d_train\.bin: \d+ bytes, its index says",
    ),
    "token id": (
        lambda p: patch(Path(f"{p}.bin"), 100, struct.pack("<H", 300)),
        "token id 300 is outside the vocabulary of 300",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_before_megatron_sees_them(source, data, damage):
    spoil, message = DAMAGE[damage]
    spoil(Path(f"{data}_train"))
    with pytest.raises(DataError, match=message) as caught:
        build(data, source / "tok")
    assert "\n" not in str(caught.value)
    assert not Path(f"{data}_cache").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("splits"),
        lambda m: m.update(splits=None),
        lambda m: m["splits"].pop("valid"),
        lambda m: m["splits"]["train"].pop("tokens"),
        lambda m: m["splits"]["train"].update(tokens="many"),
        lambda m: m["splits"]["train"].update(tokens=True),
        lambda m: m.pop("tokenizer_sha256"),
    ],
)
def test_incomplete_manifests_are_refused(source, data, change):
    path = Path(f"{data}.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"data\.prefix=.*d\.json: not a manifest \(") as caught:
        build(data, source / "tok")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_of_another_form_is_refused(source, data, content):
    Path(f"{data}.json").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.prefix=.*d\.json: not a manifest \(") as caught:
        build(data, source / "tok")
    assert "\n" not in str(caught.value)


def test_both_files_of_another_run_are_refused(source, data):
    for ext in ("bin", "idx"):
        shutil.copy(f"{data}_valid.{ext}", f"{data}_train.{ext}")
    with pytest.raises(DataError, match="the manifest says"):
        build(data, source / "tok")


def test_another_tokenizer_is_refused(source, data, tmp_path):
    train_tokenizer([source / "a.jsonl"], tmp_path / "tok2", vocab_size=301)
    with pytest.raises(DataError, match=r"data\.prefix=.*prepared with a tokenizer of .*tok2 has"):
        build(data, tmp_path / "tok2")
    data.with_name("d.json").write_text("{}")
    with pytest.raises(DataError, match=r"d\.json: not a manifest"):
        build(data, source / "tok")


def test_data_without_manifest_is_accepted(source, data):
    wanted = tokens_of(build(data, source / "tok")[0])
    data.with_name("d.json").unlink()
    assert torch.equal(tokens_of(build(data, source / "tok")[0]), wanted)


def test_requests_the_data_cannot_meet(source, data):
    windows = len(build(data, source / "tok")[1])
    with pytest.raises(DataError, match=f"data.prefix=.* has {windows} windows of 16 tokens, "):
        build(data, source / "tok", valid_samples=windows + 1)
    tokens = Path(f"{data}_valid.bin").stat().st_size // 2
    with pytest.raises(DataError, match=f"d_valid: {tokens} tokens, one sample .* needs"):
        build(data, source / "tok", seq_length=tokens, valid_samples=1)
    build(data, source / "tok", seq_length=tokens - 1, valid_samples=1)


def test_files_that_cannot_be_opened(source, data, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(DataError, match=r"d_train: cannot be read \(Permission denied\)"):
        build(data, source / "tok")
