"""Fixtures for all tests: fixed seeds, one thread, restored defaults."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version

import pytest
import torch

# Megatron and torch warn about absent accelerators at import; nothing here depends on them.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|deprecated).*")
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
    from megatron_bitcpm.platforms.cpu import cpu_patches

    with cpu_patches().applied():
        yield
