"""Documents from text files and JSON lines, as a stream: one document and one block in memory."""

from __future__ import annotations

import codecs
import json
import logging
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bitcpm.errors import DataError

logger = logging.getLogger(__name__)

STDLIB_INPUT = "stdlib:"
"""Input name that stands for the Python sources of the running interpreter's standard library."""

DOCUMENT_CHARS = 4096
"""Default longest document cut from a plain text file, in characters."""

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_STDLIB_SKIP = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}
)
_BLOCK_BYTES = 1 << 20
_PROBLEMS_KEPT = 10


@dataclass
class ReadReport:
    """What `iter_documents` has read so far; `problems` are the first messages."""

    files: int = 0
    documents: int = 0
    chars: int = 0
    bytes_read: int = 0
    lines: int = 0
    bad_lines: int = 0
    skipped_files: int = 0
    problems: list[str] = field(default_factory=list)

    def add_problem(self, where: str, reason: str) -> None:
        """Record one left-out line or file; the first few are logged, all are counted."""
        message = f"{where}: {reason}"
        if len(self.problems) < _PROBLEMS_KEPT:
            self.problems.append(message)
            logger.warning("left out %s", message)


def python_stdlib_files() -> list[Path]:
    """Return the standard library's own Python sources, sorted: 674 files, 11 MB with CPython 3.11.

    Test folders, IDLE and installed packages are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in _files_below(root, _STDLIB_SKIP) if path.suffix == ".py"]
    if not files:
        raise DataError(
            f"input={STDLIB_INPUT}: no .py files under {root}. Give text files of your own."
        )
    return files


def _files_below(root: Path, skip: Collection[str]) -> list[Path]:
    """Return the files of a folder, sorted, without hidden ones and folders named in `skip`."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def list_input_files(inputs: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Expand files, folders (recursive) and ``stdlib:`` into a sorted list for each input.

    Hidden files and folders, ``__pycache__`` and links to folders in a folder are left out.
    """
    names = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if str(name) == STDLIB_INPUT:
            files += python_stdlib_files()
        elif path.is_dir():
            files += _files_below(path, ("__pycache__",))
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(
                f"input={name}: no such file or folder. Check the path, or use stdlib:."
            )
    if not files:
        given = ", ".join(map(str, names)) or "(none)"
        raise DataError(f"input={given}: no files found. Give text or JSONL.")
    return files


def iter_documents(
    inputs: Iterable[str | os.PathLike[str]],
    *,
    jsonl_key: str = "text",
    document_chars: int = DOCUMENT_CHARS,
    max_bad_lines: int = 100,
    report: ReadReport | None = None,
) -> Iterator[str]:
    """Yield the documents of files and folders, in a fixed order.

    ``.jsonl``, ``.json`` and ``.ndjson`` files hold one JSON object a line, and one line is one
    document whatever its length. Every other file is UTF-8 text, cut at the last blank line (else
    the last line end, else anywhere) before `document_chars` characters; the pieces of a file,
    joined, are the file (a leading byte order mark aside). Documents of white space only are left
    out. Files that are binary or not UTF-8 are left out whole, with a warning, and up to
    `max_bad_lines` JSON lines.
    """
    if document_chars < 16:
        raise DataError(f"document_chars={document_chars}: too small. Use 16 or more.")
    report = ReadReport() if report is None else report
    for path in list_input_files(inputs):
        is_json = path.suffix.lower() in _JSON_SUFFIXES
        reason = _why_left_out(path, is_json)
        if reason is not None:
            report.skipped_files += 1
            report.add_problem(str(path), reason)
            continue
        report.files += 1
        pieces = (
            _iter_json_lines(path, jsonl_key, max_bad_lines, report)
            if is_json
            else _iter_text_pieces(path, document_chars, report)
        )
        with _reading(path):
            for text in pieces:
                if text.strip():
                    report.documents += 1
                    report.chars += len(text)
                    yield text


def total_bytes(files: Sequence[Path]) -> int:
    """Return the summed size of `files`, in bytes."""
    size = 0
    for path in files:
        with _reading(path):
            size += path.stat().st_size
    return size


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name an input that fails while it is read; otherwise it would look like a failed output."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8 any more, {error}"
        raise DataError(
            f"input={path}: cannot be read to its end ({reason}). Check the disk, and that nothing "
            "changes the file meanwhile."
        ) from error


def _why_left_out(path: Path, is_json: bool) -> str | None:
    """Return why a file cannot be read, or is not UTF-8 text where it is not JSON; or None."""
    # Judged before its first document is used: half a binary file is worse than none.
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with open(path, "rb") as stream:
            while not is_json and (block := stream.read(_BLOCK_BYTES)):
                if b"\0" in block:
                    return f"binary (a zero byte at offset {offset + block.index(0)})"
                decoder.decode(block)
                offset += len(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (near offset {offset + error.start}: {error.reason})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _iter_json_lines(path: Path, key: str, max_bad: int, report: ReadReport) -> Iterator[str]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            report.bytes_read += len(line)
            report.lines += 1
            if not line.strip():
                continue
            try:
                text = _json_text(line, key)
            except ValueError as error:
                report.bad_lines += 1
                report.add_problem(f"{path}:{number}", str(error))
                if report.bad_lines > max_bad:
                    raise DataError(
                        f"max_bad_lines={max_bad}: {report.bad_lines} bad JSON lines, the last at "
                        f"{path}:{number} ({error}). Repair the input, check jsonl_key, or raise "
                        "the limit."
                    ) from error
            else:
                yield text


def _json_text(line: bytes, key: str) -> str:
    """Return the text of one JSON line; ValueError says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    if key not in record:
        raise ValueError(f"no key {key!r}, keys are {', '.join(map(repr, list(record)[:5]))}")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is not a string but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # "\ud800" alone is legal JSON but no character; tokenizers refuse it
        raise ValueError(f"{key!r} holds half a surrogate pair") from error
    return text


def _iter_text_pieces(path: Path, limit: int, report: ReadReport) -> Iterator[str]:
    # newline="" keeps \r\n as written; utf-8-sig drops a byte order mark
    with open(path, encoding="utf-8-sig", newline="") as stream:
        rest = ""
        while block := stream.read(max(limit, _BLOCK_BYTES)):
            report.bytes_read += len(block.encode("utf-8"))
            report.lines += block.count("\n")
            rest += block
            start = 0
            while len(rest) - start > limit:
                end = _cut_position(rest, start, limit)
                yield rest[start:end]
                start = end
            rest = rest[start:]
        if rest:
            yield rest


def _cut_position(text: str, start: int, limit: int) -> int:
    """Return where to end the piece that begins at `start`, at most `limit` characters later."""
    # A cut in the first quarter would leave crumbs: a blank line there loses to a later line end.
    for mark in ("\n\n", "\r\n\r\n", "\n"):
        position = text.rfind(mark, start + limit // 4, start + limit)
        if position >= 0:
            return position + len(mark)
    return start + limit
