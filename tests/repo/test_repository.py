"""Configurations load, links in the documents lead somewhere, importing has no side effects."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("csrc/**/*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), target


def test_import_loads_nothing_heavy():
    code = (
        "import sys, megatron_bitcpm, megatron_bitcpm.config;"
        "print([m for m in ('megatron', 'transformers', 'torch_npu') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_two_readmes_describe_the_same_commands():
    commands = [
        set(re.findall(r"^(?:make|bitcpm|torchrun)\b.*$", (ROOT / name).read_text(), re.MULTILINE))
        for name in ("README.md", "README.zh.md")
    ]
    assert commands[0] == commands[1] and commands[0]
