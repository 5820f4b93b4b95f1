"""The host check is itself checked: wrong kernels are refused by name, their corrected twins pass,
and the documentation lists what is used and checked.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from helpers.host_check import HOST_CHECK, ROOT, build_host_check, require_tools

HEADERS = HOST_CHECK / "include"
COMPILE_TIME = HOST_CHECK / "wrong/compile_time.inc"
DOCS = ROOT / "docs/operators.md"

WRONG_KERNELS = {
    name: rule
    for file in sorted((HOST_CHECK / "wrong").glob("*.cpp"))
    for name, rule in re.findall(r'^KERNEL\((\w+), "([\w-]+)"\)', file.read_text(), re.MULTILINE)
}
COMPILE_TIME_CASES = dict(
    re.findall(r"defined\(CASE_(\w+)\)  // (.+)$", COMPILE_TIME.read_text(), re.MULTILINE)
)
# One of each kind in every run, all of them in the slow ones.
FAST_COMPILE_TIME_CASES = ("BF16_ARITHMETIC", "CAST_FLOAT_INT8", "NARROWING_STRIDE")
# Not about kernels: misuse of the program that runs them, or of the model's own limits.
RULES_WITHOUT_KERNEL = {"internal", "outside-kernel", "block-dim"}


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], str]:
    """Return what each kernel was told, by (name, wrong or right)."""
    program = build_host_check("wrong")
    lines = subprocess.run([program, "all"], capture_output=True, text=True, check=True).stdout
    words = [line.split(" ", 2) for line in lines.splitlines()]
    return {(name, which): answer for name, which, answer in words}


@pytest.mark.parametrize("name", WRONG_KERNELS)
def test_a_wrong_kernel_is_refused_by_its_rule(
    name: str, answers: dict[tuple[str, str], str]
) -> None:
    assert answers[name, "wrong"].startswith(f"error {WRONG_KERNELS[name]}: ")


@pytest.mark.parametrize("name", WRONG_KERNELS)
def test_its_corrected_twin_passes(name: str, answers: dict[tuple[str, str], str]) -> None:
    assert answers[name, "right"] == "ok"


def test_nothing_ran_that_is_not_listed(answers: dict[tuple[str, str], str]) -> None:
    assert {name for name, _ in answers} == set(WRONG_KERNELS)
    assert len(WRONG_KERNELS) >= 24


def source_rules() -> set[str]:
    text = "".join(file.read_text() for file in HEADERS.glob("*.h"))
    return set(re.findall(r'\bfail(?:_order)?\(\s*"([\w-]+)"', text))


def test_every_rule_has_a_wrong_kernel() -> None:
    assert source_rules() - RULES_WITHOUT_KERNEL == set(WRONG_KERNELS.values())


def test_the_documentation_lists_every_rule() -> None:
    section = DOCS.read_text().split("## Rules of the host check", 1)[1].split("\n## ", 1)[0]
    listed = set(re.findall(r"^\| `([\w-]+)`", section, re.MULTILINE))
    text = "".join(file.read_text() for file in HEADERS.glob("*.h"))
    compile_time = set(re.findall(r'"([a-z0-9]+-[a-z0-9-]+): ', text))
    assert listed == (source_rules() - RULES_WITHOUT_KERNEL) | compile_time


def kernel_names() -> set[str]:
    """Return every name of the device API in the kernels: functions, types, members, qualifiers."""
    folder = ROOT / "csrc/ascend"
    files = [*folder.glob("common/*.h"), *folder.glob("*/op_kernel/*")]
    text = "".join(re.sub(r"//.*", "", file.read_text()) for file in files)
    return (
        set(re.findall(r"\bAscendC::(\w+)", text))
        | set(re.findall(r"\b(PIPE_\w+|EVENT_ID\d|GM_ADDR|KERNEL_\w+|__\w+__)\b", text))
        | set(re.findall(r"(?:\.|->)(?:template )?([A-Z]\w+)(?:<\w+>)?\(", text))
    ) - set(re.findall(r"__aicore__ inline [\w:<>]+ (\w+)\(", text))


def test_the_documentation_lists_the_api_that_the_kernels_use() -> None:
    section = DOCS.read_text().split("## API used", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == kernel_names()


@pytest.mark.slow
def test_the_documented_times_are_what_the_model_prints() -> None:
    program = build_host_check("runner")
    printed = subprocess.run([program, "model"], capture_output=True, text=True, check=True).stdout
    table = DOCS.read_text().split("<!-- model-table -->\n", 1)[1].split("<!-- /model-table -->")[0]
    assert table.strip() == printed.strip()  # else: make -C tests/ascend/host_check model


def compile_case(name: str | None) -> subprocess.CompletedProcess[str]:
    require_tools("g++")
    options = ["-std=c++17", "-fsyntax-only", "-Werror=narrowing", f"-I{HEADERS}", "-x", "c++"]
    define = [f"-DCASE_{name}"] if name else []
    return subprocess.run(
        ["g++", *options, *define, str(COMPILE_TIME)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST_COMPILE_TIME_CASES else pytest.param(name, marks=pytest.mark.slow)
        for name in COMPILE_TIME_CASES
    ],
)
def test_what_the_device_cannot_do_does_not_compile(name: str) -> None:
    result = compile_case(name)
    assert result.returncode != 0
    assert COMPILE_TIME_CASES[name] in result.stderr


def test_the_frame_of_the_compile_time_cases_compiles() -> None:
    result = compile_case(None)
    assert result.returncode == 0, result.stderr
