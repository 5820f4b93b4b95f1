"""Sets of patches: gated, applied completely or not at all, and noticed when others interfere."""

from __future__ import annotations

import functools
import sys
import types

import pytest

from megatron_bitcpm.errors import BackendError, BitcpmError
from megatron_bitcpm.patching import versions
from megatron_bitcpm.patching.patch import Patch, PatchSet

pytestmark = pytest.mark.both_versions

patch_of = functools.partial(
    Patch, make=lambda old: 2, why="a test", exit="the test is over", package="torch"
)
core_patch_of = functools.partial(patch_of, package="megatron-core")


@pytest.fixture
def holder(monkeypatch):
    """A class in a module of its own, whose attribute `value` is 1."""
    module = types.ModuleType("patched_by_tests")
    module.Holder = type("Holder", (), {"value": 1})
    monkeypatch.setitem(sys.modules, "patched_by_tests", module)
    return module.Holder


def test_why_exit_and_package_are_required():
    with pytest.raises(TypeError, match="'why', 'exit', and 'package'"):
        Patch("torch:load", lambda old: old)


def test_a_later_replacement_by_others_is_an_error_and_stays(holder):
    one = PatchSet("one", [patch_of("patched_by_tests:Holder.value")])
    one.apply()
    assert holder.value == 2
    holder.value = 3
    with pytest.raises(BitcpmError, match=r"Holder\.value was replaced by others since"):
        one.revert()
    assert holder.value == 3


def test_revert_asks_for_the_same_object_not_for_an_equal_one(holder):
    one = PatchSet("one", [patch_of("patched_by_tests:Holder.value", make=lambda old: [2])])
    one.apply()
    holder.value = [2]
    with pytest.raises(BitcpmError, match="was replaced by others since"):
        one.revert()


def test_an_added_symbol_is_removed_again(holder):
    added = patch_of("patched_by_tests:Holder.extra", instead_of_absent=True)
    with PatchSet("one", [added]).applied():
        assert holder.extra == 2
    assert not hasattr(holder, "extra")


def test_a_missing_symbol_is_an_error_and_leaves_nothing_applied(holder):
    broken = PatchSet(
        "broken", [patch_of("patched_by_tests:Holder.value"), patch_of("torch:no_such_symbol")]
    )
    with pytest.raises(
        BitcpmError, match=r"^patches=broken: torch:no_such_symbol does not exist with torch \d"
    ):
        broken.apply()
    assert not broken.is_applied and holder.value == 1


def test_a_symbol_missing_where_it_is_listed_is_an_error():
    listed = (versions.megatron_version(),)
    for target in ("megatron.core.no_such_module:symbol", "megatron.core:no_such.symbol"):
        broken = PatchSet("broken", [core_patch_of(target, versions=listed)])
        with pytest.raises(BitcpmError, match="does not exist with megatron-core 0"):
            broken.apply()
        assert not broken.is_applied


def test_a_patch_is_gated_by_the_release_of_its_package(monkeypatch, holder):
    installed = {"megatron-core": "0.16.1", "mindspeed": "0.12.1", "torch": "2.7.1+cpu"}
    monkeypatch.setattr(versions, "version_of", installed.__getitem__)
    target = "patched_by_tests:Holder.value"
    left_out = [
        core_patch_of("torch:no_such_symbol", versions=((0, 12),)),
        patch_of("torch:no_such_symbol", versions=((0, 16), (2, 6))),
    ]
    needed = [
        core_patch_of(target, versions=((0, 12), (0, 16))),
        patch_of(target, package="mindspeed", versions=((0, 12),)),
        patch_of(target, versions=((2, 7),)),
        patch_of(target, package="not-installed"),
    ]
    assert PatchSet("some", left_out + needed).patches == needed


def test_a_gated_patch_wants_its_package():
    gated = patch_of("torch:load", package="no-such-package", versions=((1, 0),))
    with pytest.raises(BackendError, match=r"^no-such-package=\(absent\): is not installed\. "):
        PatchSet("some", [gated])


def test_another_megatron_that_comes_with_the_patches_is_refused(monkeypatch, holder):
    """The gate reads the path; what `apply` imports must be the same."""
    listed = (versions.megatron_version(),)
    gated = PatchSet("some", [core_patch_of("patched_by_tests:Holder.value", versions=listed)])
    stand_in = types.ModuleType("megatron.core")
    stand_in.__version__ = "0.15.0"
    monkeypatch.setitem(sys.modules, "megatron.core", stand_in)
    with pytest.raises(BackendError, match=r"^megatron-core=0\.15\.0: was imported, but"):
        gated.apply()
    assert not gated.is_applied and holder.value == 1
