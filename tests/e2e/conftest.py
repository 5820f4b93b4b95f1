"""A small corpus, tokenizer and dataset for runs of the whole trainer."""

from __future__ import annotations

import random

import pytest
import yaml
from helpers.corpora import prepare_corpus
from helpers.runs import tiny_config

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "plus",
    "minus",
    "times",
    "equals",
    "is",
    "not",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with text, tokenizer and dataset."""
    folder = tmp_path_factory.mktemp("corpus")
    chooser = random.Random(0)
    text = "\n\n".join(" ".join(chooser.choices(WORDS, k=40)) + "." for _ in range(400))
    (folder / "text.txt").write_text(text)
    prepare_corpus(folder / "text.txt", folder / "tokenizer", folder / "data" / "text", 0.1, 400)
    return folder


@pytest.fixture
def write_config(tmp_path, corpus):
    """Return a function that writes a tiny run's YAML file."""

    def write(name: str = "run", **overrides):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_config(corpus, tmp_path / name, **overrides)))
        return path

    return write
