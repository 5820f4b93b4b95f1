"""A module imports from its own folder and from lower layers only, and no two import each other.

No test imports another, and no file or function of the repository is too long to read.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_bitcpm"
FOLDERS = ("megatron_bitcpm", "tools", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = [path for path in FILES if path.name.startswith("test_")]
FILE_LINES, FUNCTION_LINES = 500, 100

# Each folder (or top-level module) and its height; equal heights do not see each other.
LAYERS = {
    "errors": 0,
    "version": 0,
    "files": 1,
    "publish": 1,
    "progress": 1,
    "records": 1,
    "arch": 2,
    "quant": 2,
    "config": 3,
    "ops": 4,
    "quantizer": 5,
    "patching": 6,
    "platforms": 7,
    "parallel": 8,
    "models": 9,
    "data": 9,
    "checkpoint": 9,
    "conversion": 10,
    "training": 10,
    "evaluation": 11,
    "doctor": 11,
    "bench": 11,
    "cli": 12,
    "__init__": 13,
    "__main__": 13,
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


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


def test_imports_go_downwards():
    paths = sorted(PACKAGE.rglob("*.py"))
    assert {part_of(path) for path in paths} == set(LAYERS), "give each folder a layer"
    found = {relative(path): violations(part_of(path), path.read_text()) for path in paths}
    assert {path: parts for path, parts in found.items() if parts} == {}


def test_the_walk_sees_an_upward_import():
    assert violations("quant", "def f():\n    from megatron_bitcpm import ops\n") == ["ops"]
    assert violations("data", "import megatron_bitcpm.models.decoder") == ["models"]
    assert violations("training", "from megatron_bitcpm.models.decoder import Decoder") == []


def module_name(file: str) -> str:
    """`a/b.py` is a.b, and `a/__init__.py` is a."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of_files(sources: dict[str, str]) -> dict[str, set[str]]:
    """Map each file to those of its fellows that it imports by name, at any depth of its code.

    Args:
        sources: contents by path below the folder that holds the top package.
    """
    files = {module_name(file): file for file in sources}
    graph = {}
    for file, source in sources.items():
        # What a relative import counts its dots from; a package counts from itself.
        package = module_name(file) + (".x" if file.endswith("__init__.py") else "")
        names = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package.rsplit(".", node.level)[0] + "." if node.level else ""
                module = (base + (node.module or "")).rstrip(".")
                members = {f"{module}.{alias.name}" for alias in node.names}
                names |= {member if member in files else module for member in members}
        graph[file] = {files[name] for name in names if name in files}
    return graph


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the groups of files that reach each other, and files that import themselves."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {file: reachable(file) for file in graph}
    groups = {
        tuple(sorted(other for other in reach[file] if file in reach[other]))
        for file in graph
        if file in reach[file]
    }
    return sorted(groups)


def test_no_two_files_import_each_other():
    sources = {
        str(path.relative_to(PACKAGE.parent)): path.read_text() for path in PACKAGE.rglob("*.py")
    }
    graph = imports_of_files(sources)
    assert sum(map(len, graph.values())) > len(graph), "the walk sees too few imports"
    assert circles(graph) == []


@pytest.mark.parametrize(
    "way_back",
    [
        "from p.a import f",
        "def f():\n    import p.a",
        "if TYPE_CHECKING:\n    from p import a",
        "from .. import a",
        "from ..a import f",
    ],
)
def test_the_walk_sees_a_circle_however_it_is_closed(way_back):
    sources = {
        "p/__init__.py": "",
        "p/a.py": "from p.sub import x",
        "p/sub/__init__.py": "from p.sub.b import x",
        "p/sub/b.py": way_back,
        "p/c.py": "import os, p.a\nfrom p.sub import b",
    }
    assert circles(imports_of_files(sources)) == [("p/a.py", "p/sub/__init__.py", "p/sub/b.py")]
    assert circles(imports_of_files({**sources, "p/sub/b.py": "import q.a"})) == []


def test_the_map_and_the_grids_do_not_know_each_other():
    grids, model = "from megatron_bitcpm.quant import grids", "import megatron_bitcpm.arch.model"
    assert violations("arch", grids) == ["quant"] and violations("quant", model) == ["arch"]


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


def imported_tests(source: str) -> list[str]:
    """Names of the test files that a file imports, at any depth of its code."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if any(part.startswith("test_") for part in name.split("."))]


def test_no_test_imports_another():
    assert len(TESTS) > 100
    found = {relative(path): imported_tests(path.read_text()) for path in TESTS}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line", ["import conversion.test_x", "from test_x import f", "from . import test_x"]
)
def test_the_walk_sees_an_imported_test(line):
    assert len(imported_tests(f"import torch\ndef f():\n    {line}\n")) == 1


def too_long(source: str) -> list[str]:
    """Return 'file' and the names of the functions that are longer than a reader likes."""
    functions = [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    return ["file"] * (len(source.splitlines()) > FILE_LINES) + functions


def test_files_and_functions_stay_readable():
    assert len(FILES) > 300
    found = {relative(path): too_long(path.read_text()) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


def test_what_is_too_long_is_seen():
    body = "        x = 1\n" * (FUNCTION_LINES - 1)
    method = f"class A:\n    @staticmethod\n    async def f():\n{body}"
    assert (too_long(method), too_long(f"{method}        x = 1\n")) == ([], ["f"])
    assert too_long("x = 1\n" * FILE_LINES) == []
    assert too_long("x = 1\n" * (FILE_LINES + 1)) == ["file"]
