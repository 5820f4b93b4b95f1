"""Samples, their order, and refusal of damaged data."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bitcpm.data.dataset import MicroBatchIterator, build_train_valid_datasets
from megatron_bitcpm.data.prepare import prepare
from megatron_bitcpm.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_bitcpm.errors import DataError

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


def build(prefix, tok, **options):
    options = {"train_samples": 40, "valid_samples": 8, "seed": 3, "seq_length": S, **options}
    return build_train_valid_datasets(str(prefix), tokenizer=load_tokenizer(tok), **options)


def tokens_of(dataset, count=None) -> torch.Tensor:
    count = len(dataset) if count is None else count
    return torch.stack([dataset[i]["tokens"] for i in range(count)])


def test_samples_are_windows_of_the_shuffled_documents(source, data):
    """One epoch, un-shuffled, is the documents in some order, cut every S tokens."""
    train, _ = build(data, source / "tok", train_samples=5)
    raw = np.fromfile(f"{data}_train.bin", np.uint16).astype(np.int64)
    documents = np.split(raw, np.flatnonzero(raw == 2)[:-1] + 1)
    stream = np.concatenate([documents[i] for i in train.document_index])
    assert len(stream) == len(raw)
    assert len(train) == (len(raw) - 1) // S
    for index in range(len(train)):
        sample = train[index]
        start = int(train.shuffle_index[index]) * S
        assert sample["tokens"].tolist() == stream[start : start + S].tolist()
        assert sample["labels"].tolist() == stream[start + 1 : start + S + 1].tolist()
        assert sample["position_ids"].tolist() == list(range(S))
        assert sample["loss_mask"].tolist() == [1.0] * S
        assert sorted(sample) == ["labels", "loss_mask", "position_ids", "tokens"]
    assert sorted(train.shuffle_index.tolist()) == list(range(len(train)))


def test_every_label_counts_end_tokens_too_after_many_samples(source, data):
    """A pad id equal to eos makes megatron-core 0.12 drop ever more labels from the loss."""
    train, valid = build(data, source / "tok")
    for dataset in (train, valid):
        masks = torch.stack([dataset[i]["loss_mask"] for i in range(len(dataset))])
        labels = torch.stack([dataset[i]["labels"] for i in range(len(dataset))])
        assert masks.eq(1).all()
        assert labels.eq(2).sum() > 10


def test_epochs_are_added_as_needed(source, data):
    one, _ = build(data, source / "tok", train_samples=1)
    many, _ = build(data, source / "tok", train_samples=3 * len(one) + 1)
    assert len(many) >= 3 * len(one) + 1


def test_training_order_follows_the_seed_and_validation_does_not(source, data):
    train, valid = build(data, source / "tok", seed=3)
    again, _ = build(data, source / "tok", seed=3, cache_dir=str(data) + "_elsewhere")
    other, other_valid = build(data, source / "tok", seed=4, valid_samples=None)
    assert torch.equal(tokens_of(train), tokens_of(again))
    assert not torch.equal(tokens_of(train, 40), tokens_of(other, 40))
    assert torch.equal(tokens_of(valid), tokens_of(other_valid))


def test_new_data_under_an_old_name_does_not_meet_old_caches(source, data):
    build(data, source / "tok")
    texts = [f"{'other ' * (i % 9)} {i}\n" for i in range(600)]
    corpus = data.parent / "b.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    prepare([corpus], source / "tok", data, overwrite=True, show_progress=False)
    stale, _ = build(data, source / "tok")
    fresh, _ = build(data, source / "tok", cache_dir=str(data.parent / "new"))
    assert torch.equal(tokens_of(stale), tokens_of(fresh))


def test_cut_caches_are_rebuilt(source, data):
    train, _ = build(data, source / "tok")
    wanted = tokens_of(train).clone()
    del train
    caches = list(Path(f"{data}_cache").rglob("*.npy"))
    assert len(caches) == 6
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
    batches = MicroBatchIterator(Numbers(count), consumed, micro, total, rank, size)
    return [batch["tokens"].flatten().tolist() for batch in batches]


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
    whole = [b["tokens"] for b in MicroBatchIterator(train, 0, 2, 8, 1, 2)]
    first = MicroBatchIterator(train, 0, 2, 8, 1, 2)
    for _ in range(3 * first.micro_batches_per_step):
        next(first)
    assert first.consumed_samples == 24
    rebuilt, _ = build(data, source / "tok")
    rest = [b["tokens"] for b in MicroBatchIterator(rebuilt, first.consumed_samples, 2, 8, 1, 2)]
    assert torch.equal(torch.stack(whole[6:]), torch.stack(rest))
    assert rest[0].shape == (2, S)
    assert rest[0].dtype == torch.int64


def test_consumed_samples_grow_by_whole_steps():
    iterator = MicroBatchIterator(Numbers(20), 0, 2, 8, 0, 1)
    seen = []
    for _ in iterator:
        seen.append(iterator.consumed_samples)
    assert seen == [0, 0, 0, 8, 8, 8, 8, 16]


def test_iterator_errors():
    with pytest.raises(DataError, match=r"global_batch_size=10: not a multiple of .* 4 x .* 2"):
        MicroBatchIterator(Numbers(20), 0, 4, 10, 0, 2)
    with pytest.raises(DataError, match="consumed_samples=21: the dataset has 20 samples"):
        MicroBatchIterator(Numbers(20), 21, 1, 1)


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
        lambda m: m.pop("tokenizer_sha256"),
    ],
)
def test_incomplete_manifests_are_refused(source, data, change):
    path = Path(f"{data}.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"data=.*d\.json: not a manifest \(") as caught:
        build(data, source / "tok")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_of_another_form_is_refused(source, data, content):
    Path(f"{data}.json").write_bytes(content)
    with pytest.raises(DataError, match=r"data=.*d\.json: not a manifest \(") as caught:
        build(data, source / "tok")
    assert "\n" not in str(caught.value)


def test_both_files_of_another_run_are_refused(source, data):
    for ext in ("bin", "idx"):
        shutil.copy(f"{data}_valid.{ext}", f"{data}_train.{ext}")
    with pytest.raises(DataError, match="the manifest says"):
        build(data, source / "tok")


def test_another_tokenizer_is_refused(source, data, tmp_path):
    train_tokenizer([source / "a.jsonl"], tmp_path / "tok2", vocab_size=301)
    with pytest.raises(DataError, match=r"tokenizer=.*tok2: sha256 .* was prepared with"):
        build(data, tmp_path / "tok2")
    data.with_name("d.json").write_text("{}")
    with pytest.raises(DataError, match=r"d\.json: not a manifest"):
        build(data, source / "tok")


def test_data_without_manifest_is_accepted(source, data):
    wanted = tokens_of(build(data, source / "tok")[0])
    data.with_name("d.json").unlink()
    assert torch.equal(tokens_of(build(data, source / "tok")[0]), wanted)


def test_requests_the_data_cannot_meet(source, data):
    windows = len(build(data, source / "tok", valid_samples=None)[1])
    with pytest.raises(DataError, match=f"valid_samples={windows + 1}: .* has {windows} windows"):
        build(data, source / "tok", valid_samples=windows + 1)
    tokens = Path(f"{data}_valid.bin").stat().st_size // 2
    with pytest.raises(DataError, match=f"d_valid: {tokens} tokens, one sample .* needs"):
        build(data, source / "tok", seq_length=tokens, valid_samples=None)
    build(data, source / "tok", seq_length=tokens - 1, valid_samples=1)
    with pytest.raises(DataError, match="train_samples=0: must be positive"):
        build(data, source / "tok", train_samples=0)


def build_on_rank(rank: int, world: int, prefix: str, tok: str, store: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    train, valid = build(prefix, tok)
    torch.save((tokens_of(train, 40), tokens_of(valid, 8)), f"{out}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_build_the_same_as_one(source, data, tmp_path):
    torch.multiprocessing.spawn(
        build_on_rank,
        (2, str(data), str(source / "tok"), str(tmp_path / "store"), str(tmp_path / "out")),
        nprocs=2,
    )
    shutil.rmtree(f"{data}_cache")
    train, valid = build(data, source / "tok")
    for rank in range(2):
        got_train, got_valid = torch.load(tmp_path / f"out{rank}")
        assert torch.equal(got_train, tokens_of(train, 40))
        assert torch.equal(got_valid, tokens_of(valid, 8))
