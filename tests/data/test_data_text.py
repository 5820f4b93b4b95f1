"""Documents from text and JSON lines."""

import json
import re
import sysconfig
from pathlib import Path

import pytest

from megatron_bitcpm.data.text import (
    ReadReport,
    iter_documents,
    list_input_files,
    python_stdlib_files,
)
from megatron_bitcpm.errors import DataError


def write_jsonl(path: Path, lines: list[object]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraph = "one line of text\nanother line\n\n"  # 31 characters
    (tmp_path / "a.txt").write_bytes((paragraph * 10).encode())
    documents = list(iter_documents([tmp_path], document_chars=100))
    # three paragraphs are 93 characters, four are too many
    assert documents == [paragraph * 3] * 3 + [paragraph]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # no blank line: the last line end within 20 characters
        ("aaaaaaa\nbbbbbbb\nccccccc\n", ["aaaaaaa\nbbbbbbb\n", "ccccccc\n"]),
        # no line end: anywhere
        ("x" * 45, ["x" * 20, "x" * 20, "x" * 5]),
        # a blank line in the first quarter is not used
        ("a\n\nbbbbbbbb\ncccccccccccc", ["a\n\nbbbbbbbb\n", "cccccccccccc"]),
        # Windows line ends stay
        ("aaaaaaaa\r\n\r\nbbbb\r\ncccccccc", ["aaaaaaaa\r\n\r\n", "bbbb\r\ncccccccc"]),
    ],
)
def test_cut_positions(tmp_path, text, expected):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(iter_documents([tmp_path], document_chars=20)) == expected


def test_cut_does_not_depend_on_read_blocks(tmp_path, monkeypatch):
    text = "".join(f"line {i} \u4f60\U0001f600\n" + "\n" * (i % 7 == 0) for i in range(3000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    whole = list(iter_documents([tmp_path], document_chars=500))
    monkeypatch.setattr("megatron_bitcpm.data.text._BLOCK_BYTES", 7)
    assert list(iter_documents([tmp_path], document_chars=500)) == whole
    assert "".join(whole) == text
    assert max(map(len, whole)) <= 500


def test_json_lines_bad_lines_are_counted_with_place_and_reason(tmp_path, caplog):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"text": "first"},
            "{broken",
            {"body": "no key"},
            {"text": 3},
            "[1, 2]",
            "",
            '{"text": "\\ud800"}',
            {"text": "   "},
            {"text": "last"},
        ],
    )
    with open(path, "ab") as stream:
        stream.write(b'{"text": "\xff"}\n')
    report = ReadReport()
    assert list(iter_documents([path], report=report)) == ["first", "last"]
    assert (report.bad_lines, report.documents, report.lines) == (6, 2, 10)
    assert report.bytes_read == path.stat().st_size
    wanted = {
        2: "not JSON",
        3: "no key 'text', keys are 'body'",
        4: "'text' is not a string but int",
        5: "not an object but list",
        7: "surrogate",
        10: "not UTF-8",
    }
    for problem, (number, reason) in zip(report.problems, wanted.items(), strict=True):
        assert problem.startswith(f"{path}:{number}: ")
        assert reason in problem
        assert problem in caplog.text


def test_too_many_bad_lines_stop_the_run(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, "{", "{", "{"])
    documents = iter_documents([path], max_bad_lines=2)
    assert next(documents) == "fine"
    with pytest.raises(DataError, match=rf"max_bad_lines=2: 3 bad .* {re.escape(str(path))}:4"):
        next(documents)
    assert list(iter_documents([path], max_bad_lines=3)) == ["fine"]


def test_json_key_and_one_line_is_one_document(tmp_path):
    long = "word " * 5000
    path = write_jsonl(tmp_path / "a.json", [{"content": long, "text": "x"}])
    assert list(iter_documents([path], jsonl_key="content", document_chars=100)) == [long]


def test_binary_and_undecodable_files_are_left_out_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good start " * 200_000 + b"\xff\xfe bad")
    (tmp_path / "b.bin").write_bytes(b"text\0more")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfkept")  # the byte order mark goes
    report = ReadReport()
    assert list(iter_documents([tmp_path], report=report)) == ["kept"]
    assert report.skipped_files == 2
    assert report.files == 1
    assert "a.txt: not UTF-8" in report.problems[0]
    assert "b.bin: binary (a zero byte at offset 4)" in report.problems[1]


def test_folder_order_is_sorted_and_hidden_files_are_not_read(tmp_path):
    for name in ("b/2.txt", "a/9.txt", "c.txt", ".git/x.txt", "a/.hidden"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert list(iter_documents([tmp_path])) == ["a/9.txt", "b/2.txt", "c.txt"]
    # the order of the inputs is the user's
    assert list(iter_documents([tmp_path / "c.txt", tmp_path / "a"])) == ["c.txt", "a/9.txt"]


def test_missing_input_is_one_line_with_the_name(tmp_path):
    with pytest.raises(DataError, match=r"input=.*nowhere: no such file or folder\. "):
        list_input_files([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no files found"):
        list_input_files([tmp_path])


def test_stdlib_is_python_source_without_tests_and_packages():
    files = python_stdlib_files()
    root = Path(sysconfig.get_paths()["stdlib"])
    inside = [path.relative_to(root) for path in files]
    assert Path("os.py") in inside
    assert Path("json/decoder.py") in inside
    assert {path.suffix for path in inside} == {".py"}
    assert not {"test", "tests", "site-packages", "idlelib"} & {p for i in inside for p in i.parts}
    assert 5e6 < sum(path.stat().st_size for path in files) < 25e6
    assert list_input_files(["stdlib:"]) == files == sorted(files)
