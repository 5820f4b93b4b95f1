"""Configurations load, links in the documents lead somewhere, importing has no side effects."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
FOLDERS_OF_DOCUMENTS = ("docs", "csrc", "tests")
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for folder in FOLDERS_OF_DOCUMENTS for path in ROOT.glob(f"{folder}/**/*.md")),
]
READMES = ("README.md", "README.zh.md")


def read_links(text: str) -> list[tuple[str, str]]:
    """Return (file, anchor) of every link within the repository; either may be empty."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t for t in targets if not t.startswith(("http://", "https://", "mailto:"))]
    return [(t.split("#")[0], t.partition("#")[2]) for t in local]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for file, anchor in read_links(path.read_text()):
        target = path.parent / file if file else path
        assert target.exists(), file
        assert not anchor or anchor in anchors(target.read_text()), f"{file}#{anchor}"


def test_anchors_are_those_of_headings():
    text = "# A, b & `c_d`\n## 两条命令\nsee [x](y.md#z), [w](#a-b)\n"
    assert anchors(text) == {"a-b--c_d", "两条命令"}
    assert read_links(text) == [("y.md", "z"), ("", "a-b")]


def test_import_loads_nothing_heavy():
    code = (
        "import sys, megatron_bitcpm, megatron_bitcpm.config;"
        "print([m for m in ('megatron', 'transformers', 'torch_npu') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def read_commands(text: str) -> set[str]:
    """Return the commands of a document: code in its lines, and lines of its code."""
    starts = r"(?:make|bitcpm|torchrun)\b"
    inline = re.findall(rf"`({starts}[^`\n]*)`", text)
    lines = re.findall(rf"^(?:\$ )?({starts}.*)$", text, re.MULTILINE)
    return {*inline, *lines}


def test_the_two_readmes_describe_the_same_commands():
    english, chinese = ((ROOT / name).read_text() for name in READMES)
    assert read_commands(english) == read_commands(chinese)
    assert {"make demo", "make test", "bitcpm verify A B"} <= read_commands(english)
    assert english.split("```")[1::2] == chinese.split("```")[1::2]


def test_the_two_readmes_have_the_same_parts():
    """The same documents in the same order, tables of the same length; each links the other."""
    texts = [(ROOT / name).read_text() for name in READMES]
    files = [[file for file, _ in read_links(t) if file not in ("", *READMES)] for t in texts]
    assert files[0] == files[1]
    assert set(ROOT.glob("docs/*.md")) <= {ROOT / file for file in files[0]}
    rows = [len(re.findall(r"^\|", text, re.MULTILINE)) for text in texts]
    assert rows[0] == rows[1]
    assert READMES[1] in texts[0] and READMES[0] in texts[1]


def test_the_hooks_before_a_commit_are_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["repo"] for hook in hooks] == ["local"]
    makefile = (ROOT / "Makefile").read_text()
    lint = makefile.split("\nlint:", 1)[1].split("\n\n", 1)[0]
    commands = re.findall(r"^\t\$\(BIN\)/(.+)$", lint, re.MULTILINE)
    assert [hook["entry"] for hook in hooks[0]["hooks"]] == [f".venv/bin/{c}" for c in commands]
    assert len(commands) == 3
