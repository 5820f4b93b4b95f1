"""The platform is found, prepares Megatron and restores it."""

from __future__ import annotations

import pytest

from megatron_bitcpm.errors import BackendError
from megatron_bitcpm.patching.core import megatron_patches
from megatron_bitcpm.patching.cpu import cpu_patches
from megatron_bitcpm.platforms import Platform, current_platform

pytestmark = pytest.mark.both_versions


def test_prepare_and_restore_are_symmetric(reverted_patches):
    platform = Platform("cpu", "gloo", 1)
    platform.prepare()
    platform.prepare()
    assert cpu_patches().is_applied and megatron_patches().is_applied
    platform.restore()
    assert not cpu_patches().is_applied and not megatron_patches().is_applied


def test_platform_choice(monkeypatch):
    current_platform.cache_clear()
    monkeypatch.setenv("BITCPM_PLATFORM", "tpu")
    with pytest.raises(BackendError, match="unknown platform"):
        current_platform()
    monkeypatch.setenv("BITCPM_PLATFORM", "cpu")
    platform = current_platform()
    assert (platform.name, platform.collectives) == ("cpu", "gloo")
    assert platform.device(5).type == "cpu"
    current_platform.cache_clear()
