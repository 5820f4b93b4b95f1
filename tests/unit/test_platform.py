"""The CPU platform: applied by one call, reverted completely, and noticed when others interfere."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from megatron_bitcpm.errors import BackendError, BitcpmError, ModelError
from megatron_bitcpm.parallel import version as version_module
from megatron_bitcpm.platforms import Patch, PatchSet, Platform, current_platform
from megatron_bitcpm.platforms import patch as patch_module
from megatron_bitcpm.platforms.cpu import cpu_patches
from megatron_bitcpm.platforms.megatron import CATALOGUE, megatron_patches
from megatron_bitcpm.platforms.patch import _own_attribute, megatron_version

pytestmark = pytest.mark.both_versions

NEEDED = {
    (0, 12): {
        "product",
        "quantize_param_shard",
        "_write_item",
        "_get_param_groups",
        "_set_main_param_and_optimizer_states",
    },
    (0, 16): {"_set_main_param_and_optimizer_states", "sharded_param_state_fully_reshardable"},
}


@pytest.fixture
def patches():
    sets = [cpu_patches(), megatron_patches()]
    were_applied = [each.is_applied for each in sets]
    for each in reversed(sets):
        each.revert()
    yield cpu_patches()
    for each in reversed(sets):
        each.revert()
    for each, was_applied in zip(sets, were_applied, strict=True):
        if was_applied:
            each.apply()


@pytest.mark.parametrize("make_set", [cpu_patches, megatron_patches])
def test_apply_and_revert_restore_every_symbol(patches, make_set):
    cpu_patches().apply()  # megatron is imported by its patches and wants a prepared torch
    if make_set is cpu_patches:
        cpu_patches().revert()
    patches = make_set()
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


@pytest.mark.slow
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


def test_the_installed_release_gets_the_patches_listed_for_it():
    names = {re.split("[.:]", patch.target)[-1] for patch in CATALOGUE}
    applied = {re.split("[.:]", patch.target)[-1] for patch in megatron_patches().patches}
    assert applied == NEEDED[megatron_version()]
    assert names == set.union(*NEEDED.values()), "a patch that no tested release needs"


def test_a_patch_of_another_release_is_left_out(monkeypatch):
    monkeypatch.setattr(patch_module, "megatron_version", lambda: (0, 16))
    old = Patch("torch:no_such_symbol", lambda old: old, "a test", versions=((0, 12),))
    both = Patch("torch:Tensor.type", lambda old: old, "a test", versions=((0, 12), (0, 16)))
    assert PatchSet("some", [old, both]).patches == [both]


def test_a_symbol_missing_where_it_is_listed_is_an_error():
    listed = (megatron_version(),)
    for target in ("megatron.core.no_such_module:symbol", "megatron.core:no_such.symbol"):
        broken = PatchSet("broken", [Patch(target, lambda old: old, "a test", versions=listed)])
        with pytest.raises(BitcpmError, match="does not exist beside megatron-core 0"):
            broken.apply()
        assert not broken.is_applied


def test_prepare_and_restore_are_symmetric(patches):
    platform = Platform("cpu", "gloo", 1)
    platform.prepare()
    platform.prepare()
    assert cpu_patches().is_applied and megatron_patches().is_applied
    platform.restore()
    assert not cpu_patches().is_applied and not megatron_patches().is_applied


def test_an_untested_release_is_refused(monkeypatch):
    for installed, accepted in (("0.12.1", True), ("0.16.3", True), ("0.14.0", False)):
        monkeypatch.setattr(version_module, "version", lambda name, v=installed: v)
        assert version_module.is_tested_version() == accepted
    with pytest.raises(ModelError, match=r"megatron-core=0\.14\.0: is not one of the tested"):
        version_module.check_megatron_version()


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
