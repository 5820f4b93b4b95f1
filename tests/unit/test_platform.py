"""The CPU platform: applied by one call, reverted completely, and noticed when others interfere."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_bitcpm.errors import BackendError, BitcpmError
from megatron_bitcpm.platforms import Patch, PatchSet, current_platform
from megatron_bitcpm.platforms.cpu import cpu_patches
from megatron_bitcpm.platforms.patch import _own_attribute


@pytest.fixture
def patches():
    was_applied = cpu_patches().is_applied
    cpu_patches().revert()
    yield cpu_patches()
    cpu_patches().revert()
    if was_applied:
        cpu_patches().apply()


def test_apply_and_revert_restore_every_symbol(patches):
    places = [patch.resolve() for patch in patches.patches]
    before = [_own_attribute(holder, name) for holder, name in places]
    patches.apply()
    patches.apply()  # twice is once
    assert all(
        _own_attribute(holder, name) is not old
        for (holder, name), old in zip(places, before, strict=True)
    )
    patches.revert()
    after = [_own_attribute(holder, name) for holder, name in places]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_cuda_literals_mean_the_cpu(patches):
    with patches.applied():
        made = torch.zeros(2, device="cuda", pin_memory=True)
        assert made.device.type == "cpu"
        assert torch.tensor([1.0], device=torch.cuda.current_device()).device.type == "cpu"
        values = torch.tensor([1.0, -2.0])
        for moved in (values.to("cuda:0"), values.cuda(), values.to("cuda:0").cuda(0)):
            assert moved.device.type == "cpu"
            assert torch.equal(moved, values)
        assert made.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert made.type(torch.float64).dtype == torch.float64
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(3))
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        assert event.query()
    assert made.type() == "torch.FloatTensor"


def test_device_contexts_still_work():
    code = (
        "import torch;"
        "from megatron_bitcpm.platforms.cpu import cpu_patches; cpu_patches().apply();"
        "torch.set_default_device(None)\n"
        "with torch.device('meta'): print(torch.empty(2).device, torch.arange(3).device)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["meta", "meta"]


def test_a_later_replacement_by_others_is_an_error():
    holder = type("Holder", (), {"value": 1})
    torch.bitcpm_test_holder = holder
    try:
        one = PatchSet("one", [Patch("torch:bitcpm_test_holder.value", lambda old: 2, "a test")])
        one.apply()
        holder.value = 3
        with pytest.raises(BitcpmError, match="was replaced by others since"):
            one.revert()
        assert holder.value == 3
    finally:
        del torch.bitcpm_test_holder


def test_a_missing_symbol_is_an_error_and_leaves_nothing_applied():
    broken = PatchSet(
        "broken",
        [
            Patch("torch:Tensor.type", lambda old: old, "a test"),
            Patch("torch:no_such_symbol", lambda old: old, "a test"),
        ],
    )
    with pytest.raises(BitcpmError, match="torch:no_such_symbol does not exist"):
        broken.apply()
    assert not broken.is_applied


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
