"""Before an output gets its name, all of it is on disk: a power cut leaves it whole or absent."""

from __future__ import annotations

import os

import pytest
from helpers.megatron_models import make_source

from megatron_bitcpm.conversion.hf.writer import write_folder
from megatron_bitcpm.conversion.megatron.legacy_writer import write_legacy
from megatron_bitcpm.conversion.megatron.torch_dist_writer import write_torch_dist

WRITERS = {
    "hf": lambda source, output: write_folder(source, output, "plain"),
    "torch_dist": write_torch_dist,
    "legacy": write_legacy,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_everything_is_flushed_before_the_rename(kind, tmp_path, monkeypatch):
    source, output = make_source(tmp_path), tmp_path / "out"
    flushed, named = {}, []
    fsync, rename = os.fsync, os.rename

    def note_flush(descriptor):
        fsync(descriptor)
        inode = os.fstat(descriptor)
        flushed[inode.st_ino] = (inode.st_size, inode.st_mtime_ns)

    def note_rename(old, new):
        if new == output:
            for path in [*old.rglob("*"), old]:
                inode = path.stat()
                now = (inode.st_size, inode.st_mtime_ns)
                named.append((path.name, flushed.get(inode.st_ino) == now))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "rename", note_rename)
    WRITERS[kind](source, output)
    assert len(named) > 3
    assert [name for name, is_on_disk in named if not is_on_disk] == []
