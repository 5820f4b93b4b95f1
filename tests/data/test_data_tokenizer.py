"""Tokenizer training, its Hugging Face folder, and loading of any folder."""

import json
import os
import random
import shutil
import socket
from pathlib import Path

import pytest
import sentencepiece

from megatron_bitcpm.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from megatron_bitcpm.data.tokenizer_train import train_tokenizer
from megatron_bitcpm.errors import DataError
from megatron_bitcpm.files import tokenizer_sha256

NASTY = [
    "",
    " ",
    "  leading and trailing  ",
    "a\tb\t\tc\n\n\nd\r\ne\rf",
    "def f(x):\n    if x:\n        return  x\n",
    "   \n \n\t \n",
    *(" " * n for n in range(2, 70)),
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 mixed \u4e2d\u6587 text",
    "\U0001f600\U0001f469\u200d\U0001f4bb e\u0301 \u00e9 \ufb01 \uff21",  # NFKC would change these
    "\x00\x01\x02\x1b[0m\x7f\x85\u2028\ufeff\ufffd",
    "<s>hi</s><unk><0x0A> <0x41></s>",
    "=-" * 37 + "-" * 41 + "#" * 33 + "ab" * 9 + "a",
    "\U0010ffff\ue000\u0378",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(["stdlib:"], path, vocab_size=1500, sample_mb=1.5)
    return path


@pytest.fixture(scope="module")
def processor(folder) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def fuzz(processor) -> list[str]:
    """Strings of random pieces, runs, and random characters."""
    rng = random.Random(0)
    ids = range(3 + 256, processor.get_piece_size())
    pieces = [processor.id_to_piece(i).replace("\u2581", " ") for i in ids]
    alphabets = ["  \n", " \t\n", "=-", "ab", "01.", "\"'", "_", ".,)(: \n"]
    ranges = [(32, 127), (0x4E00, 0x4F00), (0x1F600, 0x1F640), (1, 0x250)]
    texts = []
    for _ in range(600):
        texts.append("".join(rng.choices(pieces, k=rng.randint(1, 30))))
        texts.append("".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 60))))
        texts.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(20)))
    return texts


def test_ids_through_auto_tokenizer_are_those_of_sentencepiece(folder, processor, fuzz):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(tokenizer) == processor.get_piece_size() == 1500
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    texts = [*NASTY, *fuzz]
    assert tokenizer(texts)["input_ids"] == processor.encode(texts)
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("model_type", ["llama", "minicpm"])
def test_ids_survive_beside_a_model_config(folder, processor, tmp_path, model_type):
    """With config.json in the folder transformers may pick another tokenizer class."""
    from transformers import AutoTokenizer

    model = shutil.copytree(folder, tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    assert tokenizer(NASTY)["input_ids"] == processor.encode(NASTY)


def test_own_folder_is_read_by_sentencepiece_and_round_trips(folder, fuzz):
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 1500)
    texts = [*NASTY, *fuzz]
    ids = tokenizer.encode_batch(texts, threads=2)
    assert ids == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(i) for i in ids] == texts
    assert not {0, 1, 2} & {i for row in ids for i in row}
    assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.eos_id]) == "end"


def test_indentation_is_cheap(folder):
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("    ")) == 1
    assert len(tokenizer.encode(" " * 8)) == 1


def test_what_megatron_reads(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eod == tokenizer.eos == 2
    assert tokenizer.pad == -1  # an id that never occurs
    moved = load_tokenizer(shutil.copytree(folder, tmp_path / "moved"))
    assert tokenizer.unique_identifiers == moved.unique_identifiers
    json.dumps(tokenizer.unique_identifiers)


def test_training_is_deterministic(folder, tmp_path):
    train_tokenizer(["stdlib:"], tmp_path / "again", vocab_size=1500, sample_mb=1.5)
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_sample_is_spread_over_the_whole_text(tmp_path):
    text = "first part words\n\n" * 9000 + "zebra zigzag\n\n" * 9000  # 288 kB
    (tmp_path / "a.txt").write_text(text)
    info = train_tokenizer([tmp_path / "a.txt"], tmp_path / "t", vocab_size=300, sample_mb=0.05)
    assert 0.03e6 < info["chars"] <= 0.06e6
    tokenizer = load_tokenizer(tmp_path / "t")
    assert len(tokenizer.encode("zebra")) <= 2
    assert len(tokenizer.encode("first")) <= 2


def test_edited_folder_is_read_by_transformers(folder, tmp_path):
    edited = shutil.copytree(folder, tmp_path / "edited")
    assert tokenizer_sha256(edited) == tokenizer_sha256(folder)
    content = json.loads((edited / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 1500, "content": "<new>"})
    (edited / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert tokenizer_sha256(edited) != tokenizer_sha256(folder)
    tokenizer = load_tokenizer(edited)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.vocab_size == 1501


@pytest.fixture
def word_folder(tmp_path) -> Path:
    """A Hugging Face tokenizer of another make: words, with a hole in the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"[UNK]": 0, "[END]": 1, "hello": 2, "world": 3, "[": 4, "END": 5, "]": 6, "far": 90}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "words"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]", model_max_length=3
    ).save_pretrained(path)
    return path


def test_any_hugging_face_folder_loads_without_network(word_folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokenizer = load_tokenizer(word_folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode("hello far world nothing") == [2, 90, 3, 0]
    assert tokenizer.encode("") == []
    assert tokenizer.encode_batch([]) == []
    assert (tokenizer.eos_id, tokenizer.bos_id) == (1, None)
    assert tokenizer.vocab_size == 91  # the largest id + 1, not the 8 entries
    assert tokenizer.decode([2, 3, 1]).split() == ["hello", "world"]


def test_text_never_becomes_a_special_token(word_folder):
    ids = load_tokenizer(word_folder).encode("hello [END] world")
    assert 1 not in ids
    assert ids[0] == 2
    assert ids[-1] == 3


def test_tokenizer_without_end_token_is_refused(word_folder):
    path = word_folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    (word_folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_tokenizer(word_folder)


def test_bad_folders_are_one_line_errors(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer=.*none: no such folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="holds no tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="transformers cannot load it") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_training_errors(tmp_path):
    (tmp_path / "a.txt").write_text("abc abd abe " * 20)
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / "a.jsonl").write_text("{\n" * 5)
    cases = [
        ("a.txt", {"vocab_size": 299}, "vocab_size=299: 259 ids are reserved"),
        ("a.txt", {"vocab_size": 5000}, "vocab_size=5000: SentencePiece cannot train"),
        ("blank.txt", {}, "blank.txt: no text in 1 files"),
        ("a.jsonl", {"max_bad_lines": 2}, r"max_bad_lines=2: 3 bad JSON lines.*a\.jsonl:3"),
    ]
    for name, options, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            train_tokenizer([tmp_path / name], tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.txt", "blank.txt"]


@pytest.mark.parametrize("place", ["parent is a file", "no permission", "unreadable"])
def test_an_output_that_cannot_be_made_is_refused_before_training(tmp_path, monkeypatch, place):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    def no_training(*args, **kwargs):
        raise AssertionError("trained for an output that cannot be written")

    (tmp_path / "a.txt").write_text("abc abd abe " * 20)
    out = tmp_path / "sub" / "out"
    if place == "parent is a file":
        (tmp_path / "sub").write_text("x")
    elif place == "no permission":
        monkeypatch.setattr(os, "mkdir", fail)
    else:
        monkeypatch.setattr(os, "listdir", fail)
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", no_training)
    with pytest.raises(DataError, match=r"output_dir=.*out: cannot be written: \w") as caught:
        train_tokenizer([tmp_path / "a.txt"], out, vocab_size=300)
    assert "\n" not in str(caught.value)


def test_a_failed_training_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("abc abd abe " * 20)
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_overwriting_replaces_tokenizers_only(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some words of text to learn from\n" * 300)
    out = tmp_path / "out"
    train_tokenizer([text], out, vocab_size=300)
    with pytest.raises(DataError, match="exists"):
        train_tokenizer([text], out, vocab_size=310)
    train_tokenizer([text], out, vocab_size=310, overwrite=True)
    assert load_tokenizer(out).vocab_size == 310
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "out"]
    assert len(list(out.iterdir())) == 4
    with pytest.raises(DataError, match="not a trained tokenizer"):
        train_tokenizer([text], tmp_path, vocab_size=300, overwrite=True)
    assert text.exists()


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sample_has_a_size(size, tmp_path):
    with pytest.raises(DataError, match=r"^sample_mb=.*: must be above 0"):
        train_tokenizer(["stdlib:"], tmp_path / "t", vocab_size=300, sample_mb=size)
