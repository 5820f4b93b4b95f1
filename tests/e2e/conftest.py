"""A small corpus, tokenizer and dataset for runs of the whole trainer."""

from __future__ import annotations

import random

import pytest
import yaml

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


def tiny_config(corpus, directory, **overrides) -> dict:
    """The YAML tree of a tiny run; overrides are ``section__key=value``."""
    tree = {
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "max_position_embeddings": 32,
        },
        "quant": {"requantize": "every_step"},
        "parallel": {"tensor_model_parallel_size": 1},
        "data": {
            "prefix": str(corpus / "data" / "text"),
            "tokenizer": str(corpus / "tokenizer"),
            "seq_length": 32,
        },
        "optimizer": {"lr": 5e-3, "lr_warmup_iters": 2},
        "training": {
            "train_iters": 8,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "eval_interval": 4,
            "eval_iters": 1,
            "log_interval": 1,
        },
        "checkpoint": {"directory": str(directory), "save_interval": 4},
    }
    for path, value in overrides.items():
        section, key = path.split("__", 1)
        tree.setdefault(section, {})[key] = value
    return tree


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with text, tokenizer and dataset."""
    from megatron_bitcpm.data.prepare import prepare
    from megatron_bitcpm.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    chooser = random.Random(0)
    text = "\n\n".join(" ".join(chooser.choices(WORDS, k=40)) + "." for _ in range(400))
    (folder / "text.txt").write_text(text)
    train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=300)
    prepare(
        [folder / "text.txt"], folder / "tokenizer", folder / "data" / "text",
        valid_fraction=0.1, document_chars=400, show_progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture
def write_config(tmp_path, corpus):
    """Return a function that writes a tiny run's YAML file."""

    def write(name: str = "run", **overrides):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_config(corpus, tmp_path / name, **overrides)))
        return path

    return write
