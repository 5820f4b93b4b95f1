"""Text to indexed datasets: contents, split, manifest, atomicity."""

import io
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_bitcpm.data import prepare as prepare_module
from megatron_bitcpm.data.indexed import read_manifest
from megatron_bitcpm.data.prepare import prepare
from megatron_bitcpm.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from megatron_bitcpm.data.tokenizer_train import train_tokenizer
from megatron_bitcpm.errors import DataError
from megatron_bitcpm.version import __version__

TEXTS = [f"document {i}\n\twith  two spaces {'word ' * (i % 13)}\n" for i in range(1000)]
FILES = ["d.json", "d_train.bin", "d_train.idx", "d_valid.bin", "d_valid.idx"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with 1000 documents (`a.jsonl`) and a tokenizer (`tok`)."""
    path = tmp_path_factory.mktemp("prepare")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (path / "a.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer([path / "a.jsonl"], path / "tok", vocab_size=320)
    return path


def run(source: Path, out: Path, **options):
    options = {"show_progress": False, **options}
    return prepare([source / "a.jsonl"], source / "tok", out / "d", **options)


def read_documents(prefix: Path) -> list[list[int]]:
    """Read with a reader of our own: only lengths from the index, tokens in file order."""
    raw = Path(f"{prefix}.idx").read_bytes()
    count = int.from_bytes(raw[18:26], "little")
    lengths = np.frombuffer(raw, np.int32, count, 34)
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    assert len(tokens) == lengths.sum()
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_nth_document_is_validation_and_all_end_in_eos(source, tmp_path):
    run(source, tmp_path, valid_fraction=0.1)
    tokenizer = load_tokenizer(source / "tok")
    for split, wanted in (
        ("valid", TEXTS[9::10]),
        ("train", [text for i, text in enumerate(TEXTS) if i % 10 != 9]),
    ):
        documents = read_documents(tmp_path / f"d_{split}")
        assert [tokenizer.decode(ids[:-1]) for ids in documents] == wanted
        assert all(ids[-1] == 2 and 2 not in ids[:-1] for ids in documents)
    assert names(tmp_path) == FILES


def test_megatron_reads_the_same(source, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    run(source, tmp_path)
    dataset = IndexedDataset(str(tmp_path / "d_train"))
    documents = read_documents(tmp_path / "d_train")
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))


def test_result_does_not_depend_on_threads(source, tmp_path, monkeypatch):
    run(source, tmp_path, threads=1)
    monkeypatch.setattr(prepare_module, "_BATCH_DOCUMENTS", 7)
    (tmp_path / "other").mkdir()
    run(source, tmp_path / "other", threads=3)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_manifest(source, tmp_path):
    manifest = run(source, tmp_path, valid_fraction=0.03)
    assert manifest == json.loads((tmp_path / "d.json").read_text())
    read = read_manifest(tmp_path / "d")
    assert read.tokenizer_sha256 == manifest["tokenizer_sha256"]
    for split, count in manifest["splits"].items():
        assert getattr(read.splits, split).tokens == count["tokens"]
    assert manifest["version"] == __version__
    assert manifest["tokenizer_sha256"] == load_tokenizer(source / "tok").sha256
    assert (manifest["vocab_size"], manifest["eos_id"], manifest["dtype"]) == (320, 2, "uint16")
    for split, documents in (("train", 970), ("valid", 30)):  # every 33rd of 1000
        count = manifest["splits"][split]
        assert count["documents"] == documents
        assert count["tokens"] == (tmp_path / f"d_{split}.bin").stat().st_size // 2
    assert manifest["bad_lines"] == manifest["skipped_files"] == 0
    assert manifest["chars"] == sum(map(len, TEXTS))


def test_bad_lines_are_in_the_manifest(source, tmp_path):
    good = (source / "a.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text("{broken\n" + good)
    manifest = prepare([tmp_path / "b.jsonl"], source / "tok", tmp_path / "d", show_progress=False)
    assert manifest["bad_lines"] == 1
    assert "b.jsonl:1: not JSON" in manifest["problems"][0]
    assert sum(count["documents"] for count in manifest["splits"].values()) == 1000


def test_wide_vocabularies_get_int32(source, tmp_path, monkeypatch):
    class Wide(SentencePieceTokenizer):
        def __init__(self, folder):
            super().__init__(folder)
            self.vocab_size = 70_000

        def encode_batch(self, texts, threads=1):
            return [[69_999] * 3 for _ in texts]

    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda folder: Wide(Path(folder)))
    assert run(source, tmp_path)["dtype"] == "int32"
    assert np.fromfile(tmp_path / "d_valid.bin", np.int32)[:5].tolist() == [69_999] * 3 + [2, 69999]


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_nothing(source, tmp_path, monkeypatch, failure):
    encode = SentencePieceTokenizer.encode_batch
    calls = []

    def fail_later(self, texts, threads=1):
        calls.append(len(list(tmp_path.iterdir())))
        if len(calls) == 3:
            raise failure
        return encode(self, texts, threads)

    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", fail_later)
    with pytest.raises(type(failure)):
        run(source, tmp_path)
    assert calls == [1, 1, 1]  # there was something to clean up
    assert names(tmp_path) == []


def test_failure_keeps_the_old_files(source, tmp_path, monkeypatch):
    run(source, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    with pytest.raises(DataError, match="max_bad_lines"):
        run(source, tmp_path, jsonl_key="wrong", overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    assert names(tmp_path) == FILES


def test_failed_rename_leaves_nothing(source, tmp_path, monkeypatch):
    replace, moved = os.replace, []

    def fail_third(old, new):
        if len(moved) == 2:
            raise OSError(28, "No space left on device")
        moved.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail_third)
    with pytest.raises(DataError, match="No space left on device"):
        run(source, tmp_path)
    assert len(moved) == 2
    assert names(tmp_path) == []


def test_existing_files_need_overwrite(source, tmp_path):
    run(source, tmp_path)
    with pytest.raises(DataError, match=r"output_prefix=.*d: d_train\.bin exists"):
        run(source, tmp_path)
    assert run(source, tmp_path, overwrite=True, valid_fraction=0.5)["valid_every"] == 2


def test_short_splits_are_errors_that_leave_nothing(source, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n' * 5)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="the valid split has 0 documents, 0 tokens"):
        prepare([tmp_path / "one.jsonl"], source / "tok", out / "d", show_progress=False)
    with pytest.raises(DataError, match=r"the train split has .* \(at least 100000 needed\)"):
        run(source, out, min_tokens=100_000)
    with pytest.raises(DataError, match=r"valid_fraction=0\.9: must be in"):
        run(source, out, valid_fraction=0.9)
    assert names(out) == []


@pytest.mark.parametrize("place", ["parent is a file", "no permission", "null character"])
def test_an_output_that_cannot_be_made_is_one_line(source, tmp_path, monkeypatch, place):
    out = tmp_path / "out"
    if place == "parent is a file":
        out.write_text("x")
    elif place == "no permission":

        def fail(*args, **kwargs):
            raise PermissionError(13, "Permission denied", "secret")

        monkeypatch.setattr(os, "mkdir", fail)
    else:
        out = tmp_path / "a\0b"
    rule = {
        "parent is a file": "cannot be written: (Not a directory|File exists)",
        "no permission": "cannot be written: Permission denied",
        "null character": "is not a valid name",
    }[place]
    with pytest.raises(DataError, match=rf"output_prefix=.*: {rule}\.") as caught:
        run(source, out)
    assert "\n" not in str(caught.value)


def test_progress_is_plain_lines_without_a_terminal(source, tmp_path, capsys):
    run(source, tmp_path, show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1,000 lines" in captured.err
    assert "1,000 documents" in captured.err
    assert "\r" not in captured.err
    assert "\x1b" not in captured.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 79, 100, 200])
def test_progress_fits_the_terminal(source, tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("megatron_bitcpm.progress._LIVE_INTERVAL_S", 0.0)
    run(source, tmp_path, show_progress=True)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if "tokens/s" in line]
    assert lines
    for line in lines:
        assert len(line) <= columns
        # whole to its last word, the time left
        assert re.search(r" [\d,]+ tokens/s \S+:\S+$", line), line
    assert ("1,000 lines" in lines[-1]) == (columns == 200)


def test_the_rate_does_not_count_the_import_of_megatron(source, tmp_path, monkeypatch, capsys):
    init = prepare_module._SplitWriter.__init__

    def slow(self, *args):
        time.sleep(1.0)
        init(self, *args)

    monkeypatch.setattr(prepare_module._SplitWriter, "__init__", slow)
    begin = time.monotonic()
    manifest = run(source, tmp_path, show_progress=True)
    seconds = time.monotonic() - begin
    rate = re.search(r"([\d,]+) tokens/s", capsys.readouterr().err)
    tokens = sum(count["tokens"] for count in manifest["splits"].values())
    assert seconds > 1
    assert int(rate[1].replace(",", "")) > tokens / (seconds - 0.9)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_input_that_fails_while_it_is_read_is_not_called_an_output(
    source, tmp_path, monkeypatch, name
):
    (tmp_path / name).write_bytes((source / "a.jsonl").read_bytes())
    real_open = open

    class Failing:
        def __init__(self, stream):
            self.stream, self.reads = stream, 0

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.stream.close()

        def _fail_later(self):
            self.reads += 1
            if self.reads > 2:
                raise OSError(5, "Input/output error")

        def read(self, size):
            self._fail_later()
            return self.stream.read(16)

        def __iter__(self):
            return self

        def __next__(self):
            self._fail_later()
            return next(self.stream)

    def failing_open(path, *args, **kwargs):
        return Failing(real_open(path, *args, **kwargs))

    monkeypatch.setattr("megatron_bitcpm.data.text._why_left_out", lambda path, is_json: None)
    monkeypatch.setattr("megatron_bitcpm.data.text.open", failing_open, raising=False)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=rf"input=.*{name}: cannot be read to its end \(Input/out"):
        prepare([tmp_path / name], source / "tok", out / "d", show_progress=False)
    assert names(out) == []


def test_an_input_that_is_gone_or_changed_meanwhile(source, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe")
    monkeypatch.setattr("megatron_bitcpm.data.text._why_left_out", lambda path, is_json: None)
    with pytest.raises(DataError, match=r"input=.*a\.txt: .* \(not UTF-8 any more"):
        prepare([path], source / "tok", tmp_path / "d", show_progress=False)
    listed = prepare_module.text_source.list_input_files([path])
    path.unlink()
    with pytest.raises(DataError, match=r"input=.*a\.txt: .* \(No such file or directory\)"):
        prepare_module.text_source.total_bytes(listed)
