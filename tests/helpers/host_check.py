"""Builds the programs of the Ascend host check (csrc/ascend/host_check)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST_CHECK = ROOT / "csrc/ascend/host_check"
COMPILER = shutil.which("g++")


def build_host_check(target: str) -> Path:
    """Return the program ascend-<target>, built by make; skip without a compiler."""
    if COMPILER is None or shutil.which("make") is None:
        if os.environ.get("BITCPM_REQUIRE_BACKENDS"):
            pytest.fail("g++ and make are required to build the host check")
        pytest.skip("no g++ and make to build the host check")
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
