"""The `bitcpm` command: every verb explains itself without loading what it needs to work."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer.main

from megatron_bitcpm.cli import app, main


def list_verbs(group=None, names=()):
    """Every verb and family, each as the words that call it."""
    found = [list(names)]
    for name, command in getattr(group or typer.main.get_command(app), "commands", {}).items():
        found += list_verbs(command, (*names, name))
    return found


def test_the_verbs():
    assert [" ".join(verb) for verb in list_verbs()[1:]] == [
        *("train", "convert", "verify", "inspect", "generate", "compare", "doctor"),
        *("config-schema", "data", "data tokenizer", "data prepare"),
        *("bench", "bench ops", "bench train", "bench save", "bench convert"),
    ]


def test_help_loads_nothing_heavy():
    code = f"""
import sys
from megatron_bitcpm.cli import main
for verb in {list_verbs()}:
    try:
        main([*verb, "--help"])
    except SystemExit as end:
        assert not end.code, verb
print([m for m in ("torch", "megatron", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "megatron_bitcpm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("megatron_bitcpm ")


def test_a_wrong_input_is_one_line_with_the_rank(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["verify", str(tmp_path / "absent")])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"[rank 1] bitcpm: model={tmp_path}/absent: no such file or folder.")
    assert message.count("\n") == 1
