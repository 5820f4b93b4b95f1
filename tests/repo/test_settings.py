"""No setting without effect: every field of the configuration is read from a section's object."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_bitcpm.arch.model import ModelConfig, RopeScalingConfig
from megatron_bitcpm.config import BlendEntry, RunConfig

PACKAGE = Path(__file__).parents[2] / "megatron_bitcpm"
SECTIONS = {name: field.annotation for name, field in RunConfig.model_fields.items()}
CLASSES = {
    section.__name__: section for section in (*SECTIONS.values(), RopeScalingConfig, BlendEntry)
}
# A note for whoever reads the YAML file, and a key that is replaced before the sections are made.
NOTES = {("RopeScalingConfig", "source"), ("RopeScalingConfig", "hf_config")}


def section_of(annotation: ast.expr | None) -> set[str]:
    """Classes of sections that an annotation names."""
    if annotation is None:
        return set()
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    return names & CLASSES.keys()


class Reads(ast.NodeVisitor):
    """Collects (class of the section, attribute) of what a module reads of sections.

    An expression is a section when it is an attribute named like one (``config.training``), a name
    or an attribute that is annotated as one, or one that was assigned from such an expression.
    """

    def __init__(self, attributes: dict[str, set[str]]) -> None:
        self.attributes = attributes
        self.names: dict[str, set[str]] = {}
        self.own: set[str] = set()
        self.found: set[tuple[str, str]] = set()
        self.literals: set[str] = set()

    def sections(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.Name):
            return self.own if node.id == "self" else self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return self.attributes.get(node.attr, set())
        if isinstance(node, ast.BoolOp):
            return set().union(*map(self.sections, node.values))
        if isinstance(node, ast.IfExp):
            return self.sections(node.body) | self.sections(node.orelse)
        return set()

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self.bind(one, its)
        elif isinstance(target, ast.Name) and (found := self.sections(value)):
            self.names.setdefault(target.id, set()).update(found)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.own = self.own, {node.name} & CLASSES.keys()
        self.generic_visit(node)
        self.own = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = {name: set(found) for name, found in self.names.items()}
        for argument in (*node.args.args, *node.args.kwonlyargs):
            if found := section_of(argument.annotation):
                self.names[argument.arg] = found
        self.generic_visit(node)
        self.names = before

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_GeneratorExp(self, node) -> None:
        for generator in node.generators:
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found |= {(section, node.attr) for section in self.sections(node.value)}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        # getattr(section, name) with names in a literal tuple nearby: `for name in ("a", "b")`.
        if isinstance(node.func, ast.Name) and node.func.id == "getattr":
            for section in self.sections(node.args[0]):
                self.found |= {(section, name) for name in self.literals}
        self.generic_visit(node)


def find_reads(sources: list[str]) -> set[tuple[str, str]]:
    trees = [ast.parse(source) for source in sources]
    attributes = {name: {section.__name__} for name, section in SECTIONS.items()}
    attributes |= {"rope_scaling": {"RopeScalingConfig"}, "blend": {"BlendEntry"}}
    attributes["train_sets"] = {"BlendEntry"}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                attributes.setdefault(node.target.id, set()).update(section_of(node.annotation))
            if isinstance(node, ast.FunctionDef):
                # self._config = config, where the argument is annotated
                arguments = {a.arg: section_of(a.annotation) for a in node.args.args}
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Name):
                        for target in inner.targets:
                            found = arguments.get(inner.value.id)
                            if isinstance(target, ast.Attribute) and found:
                                attributes.setdefault(target.attr, set()).update(found)
    reads: set[tuple[str, str]] = set()
    for tree in trees:
        visitor = Reads(attributes)
        visitor.literals = {
            element.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Tuple)
            for element in node.elts
            if isinstance(element, ast.Constant) and isinstance(element.value, str)
        }
        visitor.visit(tree)
        reads |= visitor.found
    return reads


READS = find_reads([path.read_text() for path in sorted(PACKAGE.rglob("*.py"))])


@pytest.mark.parametrize(
    ("section", "field"),
    [(name, field) for name, section in CLASSES.items() for field in section.model_fields],
)
def test_every_setting_is_read(section, field):
    assert (section, field) in READS or (section, field) in NOTES


@pytest.mark.parametrize(
    "invented",
    [
        "name",
        "path",
        "weight_norm",
        "dropout",
        "size",
        "device",
        "names",
        "kind",
        "shape",
        "dtype",
        "mode",
        "rank",
        "quantizer",
        "_config",
        "fields",
        "tensor",
        "values",
    ],
)
@pytest.mark.parametrize("section", [name for name in CLASSES if name != "BlendEntry"])
def test_an_invented_setting_is_noticed(section, invented):
    """Names that other objects of the package have do not count as reads of a section."""
    assert (section, invented) not in READS


def test_what_counts_as_a_read():
    reads = find_reads(
        [
            "def f(config, quant: QuantConfig):\n    training = config.training\n"
            "    return training.seed, quant.eps, other.lr, self.lr\n"
        ]
    )
    assert reads == {("TrainConfig", "seed"), ("QuantConfig", "eps")}


def test_the_model_is_a_section():
    assert SECTIONS["model"] is ModelConfig
