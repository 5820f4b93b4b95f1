"""The version gate: the megatron.core on the path counts, and only tested releases run."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_bitcpm.errors import BackendError, ModelError
from megatron_bitcpm.patching import versions

pytestmark = pytest.mark.both_versions

PACKAGE_INFO = """\
MAJOR = {}
MINOR = {}
PATCH = {}
PRE_RELEASE = '{}'
VERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)
__version__ = '.'.join(map(str, VERSION[:3])) + ''.join(VERSION[3:])
"""


def make_checkout(folder: Path, *numbers: object) -> Path:
    """A folder with a `megatron.core` whose import fails, so that only reading it can work."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('megatron.core was imported')\n")
    (core / "package_info.py").write_text(PACKAGE_INFO.format(*numbers))
    return folder


@pytest.fixture
def checkout_first(monkeypatch, tmp_path):
    """Return a function that puts a checkout of some version first on the path."""

    def put(*numbers: object) -> Path:
        folder = make_checkout(tmp_path / "Megatron-LM", *numbers)
        monkeypatch.syspath_prepend(folder)
        versions._megatron_on_path.cache_clear()
        return folder / "megatron" / "core"

    # As in a process that has imported nothing of Megatron yet.
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    yield put
    versions._megatron_on_path.cache_clear()


def test_a_checkout_that_is_first_on_the_path_counts_and_is_not_imported(tmp_path):
    code = (
        "import sys\n"
        "from megatron_bitcpm.patching import versions\n"
        "print(versions.version_of('megatron-core'), versions.megatron_version())\n"
        "print([name for name in sys.modules if name.startswith('megatron.')"
        " or name in ('megatron', 'torch')])\n"
        "from megatron_bitcpm.doctor.diagnose import _location\n"
        "from megatron_bitcpm.doctor.software import probe_megatron\n"
        "where = _location('megatron.core')\n"
        "found = probe_megatron(versions.version_of, versions.TESTED, where)\n"
        "print(found.status, found.value)"
    )
    checkout = make_checkout(tmp_path, 0, 14, 2, "rc1")
    root = Path(versions.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{checkout}:{root}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["0.14.2rc1 (0, 14)", "[]", "problem 0.14.2rc1"]


def test_it_is_the_version_that_an_import_has(cpu_platform):
    megatron_core = importlib.import_module("megatron.core")
    assert versions.version_of("megatron-core") == megatron_core.__version__
    assert versions.version_of("torch") == importlib.metadata.version("torch")


def test_a_folder_without_code_is_passed_over_as_by_import(checkout_first, monkeypatch, tmp_path):
    checkout_first(0, 16, 7, "")
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.version_of("megatron-core") == "0.16.7"


def test_an_editable_install_is_found_by_its_finder(monkeypatch, tmp_path):
    core = make_checkout(tmp_path, 0, 16, 9, "") / "megatron" / "core"

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "megatron.core":
                return importlib.util.spec_from_file_location(name, core / "__init__.py")
            if name == "megatron":
                return importlib.machinery.ModuleSpec(name, None, is_package=True)
            return None

    monkeypatch.setattr(sys, "meta_path", [Finder])
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    assert versions._megatron_on_path.__wrapped__() == "0.16.9"


@pytest.mark.parametrize(
    ("imported", "refused"), [("0.16.1", True), ("0.12.1+abc", False), ("0.12.1", False)]
)
def test_another_megatron_than_that_on_the_path_is_refused(
    checkout_first, monkeypatch, imported, refused
):
    checkout_first(0, 12, 1, "")
    assert versions.megatron_version() == (0, 12)
    stand_in = types.ModuleType("megatron.core")
    stand_in.__version__ = imported
    monkeypatch.setitem(sys.modules, "megatron.core", stand_in)
    if not refused:
        assert versions.megatron_version() == (0, 12)
        return
    for ask in (versions.megatron_version, versions.check_megatron_version):
        with pytest.raises(BackendError) as error:
            ask()
        assert str(error.value) == (
            "megatron-core=0.16.1: was imported, but the path led to 0.12.1. Put the one you want "
            "first in PYTHONPATH, and leave sys.path as it is."
        )


def test_a_path_that_changed_between_gate_and_import_is_noticed(tmp_path):
    """Both are real checkouts: patches were chosen for the first, the second is imported."""
    for name, minor in (("first", 12), ("second", 16)):
        core = make_checkout(tmp_path / name, 0, minor, 1, "") / "megatron" / "core"
        (core / "__init__.py").write_text("from megatron.core.package_info import __version__\n")
    code = (
        "import sys\n"
        "from megatron_bitcpm.patching import versions\n"
        "print(versions.version_of('megatron-core'))\n"
        f"sys.path.insert(0, {str(tmp_path / 'second')!r})\n"
        "import megatron.core\n"
        "try: versions.megatron_version()\n"
        "except ValueError as error: print(error)"
    )
    root = Path(versions.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path / 'first'}:{root}"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = done.stdout.splitlines()
    assert before == "0.12.1"
    assert after.startswith("megatron-core=0.16.1: was imported, but the path led to 0.12.1. ")


@pytest.mark.parametrize(
    ("numbers", "version", "accepted"),
    [
        ((0, 12, 1, ""), "0.12.1", True),
        ((0, 16, 3, ""), "0.16.3", True),
        ((0, 16, 0, "rc0"), "0.16.0rc0", True),
        ((0, 12, 0, ""), "0.12.0", False),
        ((0, 14, 0, ""), "0.14.0", False),
        ((0, 17, 0, "rc1"), "0.17.0rc1", False),
    ],
)
def test_an_untested_release_is_refused_by_one_line(checkout_first, numbers, version, accepted):
    checkout_first(*numbers)
    assert versions.version_of("megatron-core") == version
    if accepted:
        versions.check_megatron_version()
        return
    with pytest.raises(ModelError) as error:
        versions.check_megatron_version()
    assert str(error.value) == (
        f"megatron-core={version}: is not one of the tested versions 0.12.1 and 0.16.x. Install "
        "megatron-core==0.16.1."
    )


@pytest.mark.parametrize("parent_is_imported", [False, True])
def test_an_absent_megatron_is_refused_by_one_line(
    checkout_first, monkeypatch, tmp_path, parent_is_imported
):
    versions._megatron_on_path.cache_clear()
    (tmp_path / "megatron" / "core").mkdir(parents=True)  # a folder, but no code
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    if parent_is_imported:
        spec = importlib.util.find_spec("megatron")
        monkeypatch.setitem(sys.modules, "megatron", importlib.util.module_from_spec(spec))
    for ask in (versions.megatron_version, versions.check_megatron_version):
        with pytest.raises(BackendError) as error:
            ask()
        assert str(error.value) == (
            "megatron-core=(absent): is not installed. Install megatron-core==0.16.1."
        )
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        versions.version_of("megatron-core")


@pytest.mark.parametrize("text", ["MAJOR = 0\nMINOR = 16\n", "MAJOR = (", None])
def test_a_checkout_without_a_readable_version_is_refused(checkout_first, text):
    package_info = checkout_first(0, 16, 1, "") / "package_info.py"
    package_info.unlink() if text is None else package_info.write_text(text)
    with pytest.raises(BackendError, match=r"^megatron-core=.*package_info\.py: names no version"):
        versions.check_megatron_version()
