"""Fixtures: data, trained checkpoints and exported folders, each made once."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from helpers.corpora import prepare_corpus
from helpers.trained_checkpoints import train_case

# Torch remembers its factories at the first use of a device context. Let that be before a CPU
# platform replaces them, or transformers leaves buffers uninitialised for the rest of the process.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a tokenizer (`tok`, 300 ids) and prepared data (`d`)."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 5))) for _ in range(60)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(3000)]
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    prepare_corpus(folder / "a.txt", folder / "tok", folder / "d", 0.2, 2000)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """Function: name of a case -> its finished run."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = train_case(name, data, tmp_path_factory.mktemp(name) / "run")
        return done[name]

    return get


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """Function: name of a case -> its exported folder; do not change it, see `damaged`."""
    from megatron_bitcpm.conversion.convert import convert

    done = {}

    def get(name):
        if name not in done:
            output = tmp_path_factory.mktemp("hf") / name
            convert(trained(name).directory, output)
            done[name] = output
        return done[name]

    return get


@pytest.fixture
def damaged(exported, tmp_path):
    """Function: name of a case -> a copy of its folder, to damage."""

    def get(name):
        return shutil.copytree(exported(name), tmp_path / "copy")

    return get
