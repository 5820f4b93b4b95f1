"""What the catalogues list: for CPUs, for the tested releases of megatron-core, and for files."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from megatron_bitcpm.patching import core, cpu
from megatron_bitcpm.patching.core import megatron_patches
from megatron_bitcpm.patching.cpu import cpu_patches
from megatron_bitcpm.patching.patch import _own_attribute
from megatron_bitcpm.patching.versions import TESTED, megatron_version

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


def names(patches) -> set[str]:
    return {re.split("[.:]", patch.target)[-1] for patch in patches}


def of_checkpoints() -> list:
    from megatron_bitcpm.checkpoint.safe_load import _restrictions
    from megatron_bitcpm.checkpoint.writer import _in_process

    return [*_restrictions().patches, *_in_process().patches]


def test_every_patch_says_why_it_is_there_and_when_it_can_go(cpu_platform):
    patches = [*cpu.CATALOGUE, *core.CATALOGUE, *of_checkpoints()]
    assert len(patches) > 50
    for patch in patches:
        for text in (patch.why, patch.exit):
            assert text.strip() and "\n" not in text and not text.endswith("."), patch.target
        assert patch.package in ("megatron-core", "torch"), patch.target
    targets = [patch.target for patch in patches]
    assert len(targets) == len(set(targets))


def test_gated_patches_are_for_tested_releases():
    tested = {tuple(int(n) for n in version.split(".")[:2]) for version in TESTED}
    for patch in [*cpu.CATALOGUE, *core.CATALOGUE]:
        assert set(patch.versions) <= tested, patch.target


def test_the_installed_release_gets_the_patches_listed_for_it():
    assert names(megatron_patches().patches) == NEEDED[megatron_version()]
    assert names(core.CATALOGUE) == set.union(*NEEDED.values()), "no tested release needs it"


@pytest.mark.parametrize("make_set", [cpu_patches, megatron_patches])
def test_apply_and_revert_restore_every_symbol(reverted_patches, make_set):
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


def test_cuda_literals_mean_the_cpu(reverted_patches):
    with cpu_patches().applied():
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
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(event)
        stream.synchronize()
        assert stream.record_event(event) is event and stream.record_event().query()
    assert made.type() == "torch.FloatTensor"


@pytest.mark.slow
def test_device_contexts_still_work():
    code = (
        "import torch;"
        "from megatron_bitcpm.patching.cpu import cpu_patches; cpu_patches().apply();"
        "torch.set_default_device(None)\n"
        "with torch.device('meta'): print(torch.empty(2).device, torch.arange(3).device)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["meta", "meta"]
