"""Configurations load, links in the documents lead somewhere, importing has no side effects."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bitcpm.config import RunConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
FOLDERS_OF_DOCUMENTS = ("docs", "csrc", "tests")
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for folder in FOLDERS_OF_DOCUMENTS for path in ROOT.glob(f"{folder}/**/*.md")),
]


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


def test_no_setting_is_unread():
    """Every field of the configuration is read somewhere, not only declared."""
    code = "\n".join(
        path.read_text()
        for path in (ROOT / "megatron_bitcpm").rglob("*.py")
        if path.name != "sections.py"
    )
    # Properties of the sections resolve defaults: what they read of `self` counts.
    code += (ROOT / "megatron_bitcpm" / "config" / "sections.py").read_text()
    aliases = {"optimizer": "optimizer|settings", "guard": "guard|_config|config"}
    for section_name, section in RunConfig.model_fields.items():
        holder = aliases.get(section_name, section_name)
        for field in section.annotation.model_fields:
            read = re.compile(rf"\b({holder}|self)\.{field}\b")
            assert read.search(code), f"{section_name}.{field}"
