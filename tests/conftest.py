"""Fixtures for all tests: fixed seeds, one thread, restored defaults."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version

import pytest
import torch

# Megatron and torch warn about absent accelerators at import; nothing here depends on them.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|deprecated).*")
pytest_plugins = ["helpers.exported_models"]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_report_header():
    return ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch", "numpy"))


@pytest.fixture(autouse=True)
def _fixed_seed():
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def cpu_platform():
    """Megatron runs on this CPU for the duration of the test."""
    from megatron_bitcpm.patching.cpu import cpu_patches

    with cpu_patches().applied():
        yield


@pytest.fixture
def reverted_patches():
    """No patch of torch or megatron-core is in force when the test begins; undone afterwards."""
    from megatron_bitcpm.patching.core import megatron_patches
    from megatron_bitcpm.patching.cpu import cpu_patches

    sets = [cpu_patches(), megatron_patches()]
    were_applied = [each.is_applied for each in sets]
    for each in reversed(sets):
        each.revert()
    yield
    for each in reversed(sets):
        each.revert()
    for each, was_applied in zip(sets, were_applied, strict=True):
        if was_applied:
            each.apply()
