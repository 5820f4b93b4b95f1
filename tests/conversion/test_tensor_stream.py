"""Tensors on their way to disk: made ahead, checked, counted."""

from __future__ import annotations

import io
import sys
import threading
import time

import pytest
import torch

from megatron_bitcpm.conversion.tensor_stream import read_ahead
from megatron_bitcpm.errors import CheckpointError
from megatron_bitcpm.progress import track_tensors


def test_read_ahead_makes_two_at_most():
    alive, made = [], []

    class Item:
        def __init__(self, number):
            self.number = number
            made.append(number)
            alive.append(number)

        def __del__(self):
            alive.remove(self.number)

    def produce():
        for number in range(20):
            yield Item(number)

    seen = []
    for item in read_ahead(produce()):
        seen.append(item.number)
        time.sleep(0.001)
        # The consumer's, the next one, and for an instant the one that the loop let go of.
        assert len(alive) <= 3
        del item
    assert seen == list(range(20))


def test_read_ahead_hands_errors_on_and_closes():
    closed = []

    def produce(bad):
        try:
            yield 1
            if bad:
                raise CheckpointError("damaged")
            yield from range(100)
        finally:
            closed.append(bad)

    with pytest.raises(CheckpointError, match="damaged"):
        list(read_ahead(produce(True)))
    stream = read_ahead(produce(False))
    assert next(stream) == 1
    stream.close()
    assert closed == [True, False]


def test_read_ahead_takes_one_thread_and_gives_the_others_back():
    torch.set_num_threads(3)

    def produce():
        yield torch.get_num_threads()

    assert list(read_ahead(produce())) == [1]
    assert torch.get_num_threads() == 3
    assert list(read_ahead(torch.get_num_threads() for _ in range(2))) == [1, 1]
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_the_bar_is_for_terminals_only(monkeypatch, capsys):
    sizes = {"a": 10, "b": 20}
    assert list(track_tensors(sizes, "write")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(track_tensors(sizes, "write")) == ["a", "b"]
    assert "write" in stream.getvalue()
