"""Ids read from tokenizer files alone are those of the loaded tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_bitcpm.data.tokenizer import load_tokenizer
from megatron_bitcpm.data.tokenizer_ids import TokenizerIds, read_tokenizer_ids
from megatron_bitcpm.errors import CheckpointError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "a\u2028b"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A SentencePiece model of 300 pieces: unk 0, bos 1, eos 2, no padding."""
    from megatron_bitcpm.data.tokenizer_train import train_tokenizer

    folder = tmp_path_factory.mktemp("sp")
    (folder / "a.txt").write_text("some words of text to learn from\n" * 300)
    train_tokenizer([folder / "a.txt"], folder / "tok", vocab_size=300)
    return folder / "tok" / "tokenizer.model"


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def check_against_loaded(folder) -> TokenizerIds:
    found, loaded = read_tokenizer_ids(folder), load_tokenizer(folder)
    assert (found.size, found.eos, found.bos) == (loaded.vocab_size, loaded.eos_id, loaded.bos_id)
    return found


def test_vocab_txt(tmp_path):
    write(tmp_path, tokenizer_config={"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"})
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    assert check_against_loaded(tmp_path) == TokenizerIds(len(WORDS), None, 3, None)


def test_added_tokens_of_a_slow_tokenizer(tmp_path):
    write(
        tmp_path,
        tokenizer_config={"tokenizer_class": "BertTokenizer"},
        special_tokens_map={"eos_token": "<end>"},
        added_tokens={"<end>": len(WORDS) + 1, "<more>": len(WORDS)},
    )
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    found = check_against_loaded(tmp_path)
    assert (found.size, found.eos) == (len(WORDS) + 2, len(WORDS) + 1)


def test_vocab_json_and_added_tokens(tmp_path):
    vocab = {"<unk>": 0, "<|endoftext|>": 1, "a": 2, "b": 3}
    write(
        tmp_path,
        vocab=vocab,
        added_tokens={"<|im_end|>": 4},
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"},
        special_tokens_map={"eos_token": {"content": "<|im_end|>", "lstrip": False}},
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert check_against_loaded(tmp_path) == TokenizerIds(5, 1, 4, None)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_files(name, model, tmp_path):
    shutil.copy(model, tmp_path / name)
    assert read_tokenizer_ids(tmp_path) == TokenizerIds(300, 1, 2, None)
    # Ids that a class of transformers adds, as its tokenizer_config.json lists them.
    added = {"0": {"content": "<s>"}, "301": {"content": "<mask>"}}
    write(tmp_path, tokenizer_config={"added_tokens_decoder": added})
    assert read_tokenizer_ids(tmp_path) == TokenizerIds(302, 0, 2, None)


def test_a_sentencepiece_file_beside_vocab_json_only_cuts_the_text(model, tmp_path):
    shutil.copy(model, tmp_path / "sentencepiece.bpe.model")
    write(tmp_path, vocab={"<s>": 0, "</s>": 2, "x": 7})
    assert read_tokenizer_ids(tmp_path).size == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", b"#version", r"holds no vocabulary \(tokenizer.json, .*vocab.txt\)\. Save"),
        ("tekken.json", b"{}", "holds no vocabulary"),
        ("vocab.txt", b"", "holds no vocabulary"),
        ("vocab.txt", b"\xff\xfe", "cannot be understood"),
        ("spiece.model", b"no model", "cannot be understood"),
        ("spiece.model", b"", "cannot be understood"),
        ("vocab.json", b'{"a": "1"}', "cannot be understood .*'a' has id '1'"),
        ("vocab.json", b'{"a": true}', "cannot be understood .*'a' has id True"),
        ("vocab.json", b'{"a": -1}', "cannot be understood .*'a' has id -1"),
        ("vocab.json", b"[]", "file=.*vocab.json: holds no JSON object"),
    ],
)
def test_what_is_not_supported_is_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tokenizer_ids(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"4": "a"}},
        {"added_tokens_decoder": None},
        {"eos_token": ["</s>"]},
        {"eos_token": {"text": "</s>"}},
    ],
)
def test_a_config_of_another_form_is_one_line(config, tmp_path):
    write(tmp_path, vocab={"a": 0}, tokenizer_config=config)
    with pytest.raises(CheckpointError, match=r"tokenizer=.*cannot be understood") as caught:
        read_tokenizer_ids(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_size_than_the_models_is_refused(model, tmp_path):
    shutil.copy(model, tmp_path / "spiece.model")
    assert read_tokenizer_ids(tmp_path, vocab_size=300).size == 300
    with pytest.raises(CheckpointError, match="its files hold 300 ids, the model has 400"):
        read_tokenizer_ids(tmp_path, vocab_size=400)
