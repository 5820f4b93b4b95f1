"""Outputs are complete or absent, whatever happens at any step of writing them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.death import die_at

from megatron_bitcpm import publish
from megatron_bitcpm.errors import CheckpointError, DataError
from megatron_bitcpm.publish import Output, clean_up_after_killed, scratch_beside

NAMES = ["d.bin", "d.idx", "d.json"]


def write_folder(parent: Path, content: str) -> None:
    with Output(parent / "out", overwrite=True).new_folder() as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "a").write_text(content)
        (scratch / "b").write_text(content)


def write_file(parent: Path, content: str) -> None:
    with Output(parent / "out.bin", overwrite=True).new_file() as scratch:
        scratch.write_text(content)


def write_files(parent: Path, content: str) -> None:
    output = Output(parent / "d", overwrite=True)
    with output.new_files([parent / name for name in NAMES]) as scratch:
        for name in NAMES:
            (scratch / name).write_text(content)


def write_text(parent: Path, content: str) -> None:
    publish.write_text(parent / "tracker", content)


def contents(parent: Path) -> dict[str, str]:
    return {
        str(path.relative_to(parent)): path.read_text()
        for path in sorted(parent.rglob("*"))
        if path.is_file()
    }


def visible(found: dict[str, str]) -> dict[str, str]:
    return {name: content for name, content in found.items() if not name.startswith(".")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WRITERS = [write_folder, write_file, write_files, write_text]


# -- death -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
def test_death_at_every_change(write, tmp_path):
    (tmp_path / "old").mkdir()
    write(tmp_path / "old", "old")
    old = contents(tmp_path / "old")
    new = dict.fromkeys(old, "new")
    found, event, died = [], 0, True
    while died:
        event += 1
        parent = shutil.copytree(tmp_path / "old", tmp_path / f"parent{event}")
        died = die_at(event, lambda parent=parent: write(parent, "new"))
        if write is not write_text:  # its file is cleaned up by the run that owns the folder
            for path in (parent / "out", parent / "out.bin", parent / "d"):
                clean_up_after_killed(path)
            assert [name for name in names(parent) if name.startswith(".")] == []
        found.append(visible(contents(parent)))
        write(parent, "newer")
        assert contents(parent) == dict.fromkeys(old, "newer")
    # One moment at which the old output becomes the new one.
    if write is write_files:
        # Of several files the manifest says so: without it they are incomplete.
        found = [files for files in found if "d.json" in files]
    assert set(map(str, found)) == {str(old), str(new)}
    assert found == sorted(found, key=lambda files: files == new)
    assert event > 4


def test_killed_between_the_two_renames(tmp_path):
    write_folder(tmp_path, "old")
    before = contents(tmp_path)
    (tmp_path / ".tmp-out-abcdefgh").mkdir()
    (tmp_path / "out").rename(tmp_path / ".old.tmp-out-abcdefgh")
    with (
        pytest.raises(CheckpointError, match="exists"),
        Output(tmp_path / "out", overwrite=False).new_folder(),
    ):
        raise AssertionError
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["out"]


def test_killed_by_a_signal(tmp_path):
    write_folder(tmp_path, "old")
    program = """
import os, signal, sys
from pathlib import Path
from megatron_bitcpm.publish import Output
with Output(Path(sys.argv[1]), overwrite=True).new_folder() as scratch:
    (scratch / "b").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], timeout=60)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 2
    write_folder(tmp_path, "new")
    assert names(tmp_path) == ["out"]


# -- the living ------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path):
    """Another process's lock: of another open file."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_what_living_processes_write_is_left_alone(tmp_path):
    with scratch_beside(tmp_path / "out") as one:
        (one / "mine").write_text("x")
        write_folder(tmp_path, "new")
        assert (one / "mine").read_text() == "x"
        with scratch_beside(tmp_path / "out") as two:
            assert one != two
    assert names(tmp_path) == ["out"]


def test_only_leftovers_of_this_output_go(tmp_path):
    write_folder(tmp_path, "old")
    kept = [
        ".tmp-out-two-abcdefgh",
        ".tmp-out-abcdefghi",
        ".tmp-out-ABCDEFGH",
        ".old.tmp-in-abcdefgh",
    ]
    for name in (*kept, ".tmp-out-abcdefgh", ".old.tmp-out-zzzzzzzz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    # The process that is about to remove what it replaced holds the lock of the output.
    with locked(tmp_path / "out"):
        clean_up_after_killed(tmp_path / "out")
        assert names(tmp_path) == sorted([*kept, ".old.tmp-out-zzzzzzzz", "out"])
    clean_up_after_killed(tmp_path / "out")
    assert names(tmp_path) == sorted([*kept, "out"])


def test_a_scratch_folder_that_others_clean_up_is_made_again(tmp_path, monkeypatch):
    flock, seen = fcntl.flock, []

    def interfere(descriptor, how):
        seen.append(descriptor)
        (scratch,) = tmp_path.glob(".tmp-out-*")
        if len(seen) == 1:  # the other one has the lock
            scratch.rmdir()
            raise BlockingIOError
        if len(seen) == 2:  # the other one is done
            scratch.rmdir()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", interfere)
    with scratch_beside(tmp_path / "out") as scratch:
        assert scratch.is_dir()
        assert len(seen) == 3


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*unused):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    (tmp_path / ".tmp-out-abcdefgh").mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    write_folder(tmp_path, "new")
    # Nobody knows whether its process lives.
    assert names(tmp_path) == [".tmp-out-abcdefgh", "out"]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir", "open"])
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_the_old_output(write, call, tmp_path, monkeypatch):
    real = getattr(os, call)
    write(tmp_path, "old")
    old = contents(tmp_path)
    for number in range(20):
        calls, failed = [], False

        def fail(*args, number=number, calls=calls, **kwargs):
            calls.append(args)
            if len(calls) == number + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, fail)
        try:
            write(tmp_path, "new")
        except (CheckpointError, OSError) as error:
            assert "No space left on device" in str(error)
            failed = True
        monkeypatch.undo()
        if len(calls) <= number:
            break
        found = contents(tmp_path)
        if visible(found) == dict.fromkeys(old, "new"):
            # Only to flush the new name failed: an old folder stays until the next run.
            assert not failed or call in ("fsync", "open")
        elif write is write_files and call == "replace":
            assert "d.json" not in found and set(found.values()) <= {"old"}
        else:
            assert found == old
        write(tmp_path, "old")
        assert contents(tmp_path) == old
    assert number < 19
    uses = {write_folder: {"rename", "mkdir"}, write_files: {"replace", "mkdir"}}
    if call in uses.get(write, ()) or call == "fsync":
        assert number > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")])
def test_an_error_in_the_block_leaves_nothing(error, tmp_path):
    output = Output(tmp_path / "sub" / "out", overwrite=False)
    with pytest.raises(type(error)), output.new_folder() as scratch:
        (scratch / "a").touch()
        raise error
    assert names(tmp_path / "sub") == []


def test_messages_name_the_argument(tmp_path):
    (tmp_path / "file").touch()
    inside = Output(tmp_path / "file" / "sub" / "out", True, "output_dir", DataError)
    with pytest.raises(DataError) as caught, inside.new_folder():
        raise AssertionError
    assert str(caught.value) == (
        f"output_dir={tmp_path}/file/sub/out: cannot be written: Not a directory. Free space, "
        "or name another place."
    )
    for name in ("", "/", "a\0b"):
        with (
            pytest.raises(DataError, match=r"^output_dir='.*': is not a valid name\."),
            Output(Path(name), True, "output_dir", DataError).new_file(),
        ):
            raise AssertionError


def test_absent_parents_are_made_unless_they_must_be_there(tmp_path):
    path = tmp_path / "a" / "b" / "out"
    with (
        pytest.raises(CheckpointError, match="No such file"),
        Output(path, True, make_parents=False).new_file(),
    ):
        raise AssertionError
    assert names(tmp_path) == []
    with Output(path, True).new_file() as scratch:
        scratch.touch()
    assert path.is_file()


# -- what is replaced ------------------------------------------------------------------------------


def test_only_what_may_be_replaced_is(tmp_path):
    write_folder(tmp_path, "old")
    before = contents(tmp_path)

    def why_kept(path):
        return "is not ours" if (path / "b").read_text() == "old" else None

    for overwrite, rule in ((False, r"exists\. Name a new one, or add --overwrite"), (True, "not")):
        output = Output(tmp_path / "out", overwrite, why_kept=why_kept)
        with pytest.raises(CheckpointError, match=rule), output.new_folder():
            raise AssertionError
        assert contents(tmp_path) == before
    (tmp_path / "out" / "b").write_text("other")
    with output.new_folder() as scratch:
        (scratch / "c").touch()
    assert names(tmp_path / "out") == ["c"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    output = Output(tmp_path / "d", overwrite=False)
    with (
        pytest.raises(CheckpointError, match=r"output=.*/d: d\.idx exists\. Name a new one"),
        output.new_files([tmp_path / name for name in NAMES]) as scratch,
    ):
        for name in NAMES:
            (scratch / name).touch()
        (tmp_path / "d.idx").write_text("mine")
    assert contents(tmp_path) == {"d.idx": "mine"}


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with Output(tmp_path / "out", overwrite=False).new_folder() as scratch:
        (scratch / "a").touch()
    assert names(tmp_path / "out") == ["a"]


def test_a_link_is_replaced_and_not_what_it_means(tmp_path):
    write_folder(tmp_path / "elsewhere", "old")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "out")
    (tmp_path / "out.bin").symlink_to(tmp_path / "elsewhere" / "out" / "b")
    write_folder(tmp_path, "new")
    write_file(tmp_path, "new")
    assert names(tmp_path) == ["elsewhere", "out", "out.bin"]
    assert not (tmp_path / "out").is_symlink() and not (tmp_path / "out.bin").is_symlink()
    assert set(contents(tmp_path / "elsewhere").values()) == {"old"}


# -- flushed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
def test_all_is_flushed_once_before_it_gets_its_name(write, tmp_path, monkeypatch):
    flushed, named = {}, []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_flush(descriptor):
        fsync(descriptor)
        inode = os.fstat(descriptor).st_ino
        flushed[inode] = flushed.get(inode, 0) + 1

    def note(move):
        def noting(old, new):
            for path in [*Path(old).rglob("*"), Path(old)]:
                named.append((path.name, flushed.get(path.stat().st_ino)))
            move(old, new)
            named.append(new)

        return noting

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "rename", note(rename))
    monkeypatch.setattr(os, "replace", note(replace))
    write(tmp_path, "new")
    assert [found for found in named if isinstance(found, tuple) and found[1] != 1] == []
    # Last of all the new names.
    assert flushed[tmp_path.stat().st_ino] == 1
    assert len(named) > 1


def test_the_umask_decides_who_may_read(tmp_path):
    umask = os.umask(0o027)
    try:
        write_folder(tmp_path, "new")
    finally:
        os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
