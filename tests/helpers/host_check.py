"""Builds the programs of the Ascend host check (tests/ascend/host_check)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST_CHECK = ROOT / "tests/ascend/host_check"


def require_tools(*names: str) -> None:
    """Skip the test where a program is absent; fail it with BITCPM_REQUIRE_BACKENDS=1."""
    absent = [name for name in names if shutil.which(name) is None]
    if not absent:
        return
    reason = f"not installed: {', '.join(absent)}"
    if os.environ.get("BITCPM_REQUIRE_BACKENDS") == "1":
        pytest.fail(f"{reason}, and BITCPM_REQUIRE_BACKENDS=1")
    pytest.skip(reason)


def build_host_check(target: str) -> Path:
    """Return the program ascend-<target>, built by make; skip without a compiler."""
    require_tools("g++", "make")
    folder = ROOT / "build/checks"
    # The runner is built as its own tests build it; the others run too little to be worth -O2.
    options = [] if target == "runner" else ["OPTIMISE=-O1"]
    made = subprocess.run(
        ["make", "-s", "-C", str(HOST_CHECK), target, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return folder / f"ascend-{target}"
