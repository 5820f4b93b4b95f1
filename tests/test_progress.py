"""One bar for all long work: on a terminal alive, elsewhere lines or nothing."""

from __future__ import annotations

import io
import re
import sys

import pytest

from megatron_bitcpm.progress import Progress


def become_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def plain(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_bar_goes_and_what_was_said_stays(monkeypatch):
    terminal = become_terminal(monkeypatch)
    with Progress("work", 10, "{task.completed} of {task.total}", completed=2) as progress:
        progress.update(7)
        progress.say("[a] note")
    shown = plain(terminal)
    assert "2 of 10" in shown and "7 of 10" in shown and "work" in shown
    assert "[a] note\n" in shown
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K")  # up one line, and wipe it


def test_a_text_stays_with_its_last_parts(monkeypatch):
    terminal = become_terminal(monkeypatch)
    with Progress("work", 10, text=lambda seconds: ["long " * 20, "first", "last"]) as progress:
        progress.update(1)
        progress.update(10)
    *_, last = plain(terminal).split("\r")
    assert re.fullmatch(r"work .{10} first  last 0:00:00\n", last)


def test_without_a_terminal_a_bar_is_nothing_and_a_text_is_a_line(capsys):
    with Progress("work", 10, "{task.completed}") as progress:
        progress.update(7)
        progress.say("[a] note")
    assert capsys.readouterr() == ("", "[a] note\n")
    with Progress("work", 10, text=lambda seconds: [f"{seconds > 0}", "b"]) as progress:
        for done in range(10):  # in less than an interval: one line
            progress.update(done)
    assert capsys.readouterr() == ("", "work: True  b\n")


def test_nothing_is_said_of_work_that_did_not_begin_or_is_not_asked_for(capsys):
    with Progress("work", 10, text=lambda seconds: ["a"]):
        pass
    with Progress("work", 10, text=lambda seconds: ["a"], enabled=False) as progress:
        progress.update(10)
    assert capsys.readouterr() == ("", "")
