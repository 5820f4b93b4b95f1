"""A module imports from its own folder and from lower layers only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_bitcpm"

# Each folder (or top-level module) and its height; equal heights do not see each other.
LAYERS = {
    "errors": 0,
    "version": 0,
    "files": 1,
    "config": 1,
    "quant": 2,
    "ops": 3,
    "platforms": 4,
    "parallel": 5,
    "models": 6,
    "data": 6,
    "patching": 6,
    "checkpoint": 6,
    "export": 6,
    "conversion": 7,
    "training": 7,
    "evaluation": 8,
    "doctor": 8,
    "bench": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported_parts(tree: ast.AST) -> set[str]:
    """Names directly below megatron_bitcpm that a module imports, at any depth of its code."""
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            names = [
                f"{module}.{a.name}" if module == "megatron_bitcpm" else module for a in node.names
            ]
        else:
            continue
        parts |= {n.split(".")[1] for n in names if n.startswith("megatron_bitcpm.")}
    return parts


def violations(part: str, source: str) -> list[str]:
    return [
        other
        for other in imported_parts(ast.parse(source))
        if other != part and other in LAYERS and LAYERS[other] >= LAYERS[part]
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_go_downwards(path):
    part = part_of(path)
    assert part in LAYERS, f"{path}: give the folder a layer"
    assert violations(part, path.read_text()) == []


def test_the_walk_sees_an_upward_import():
    assert violations("quant", "def f():\n    from megatron_bitcpm import ops\n") == ["ops"]
    assert violations("data", "import megatron_bitcpm.models.decoder") == ["models"]
    assert violations("training", "from megatron_bitcpm.models.decoder import build_model") == []


def test_compiled_modules_are_imported_by_ops_only():
    importers = {
        part_of(path)
        for path in PACKAGE.rglob("*.py")
        if "megatron_bitcpm._cpu" in path.read_text()
        or "from megatron_bitcpm import _cpu" in path.read_text()
    }
    assert importers <= {"ops"}


def test_environment_is_read_in_config_only():
    readers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "BITCPM_" in path.read_text() and "os.environ" in path.read_text()
    }
    assert readers <= {"config/environment.py"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 500
