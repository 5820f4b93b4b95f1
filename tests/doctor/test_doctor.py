"""The doctor on imitated machines: folders, variables and modules that look like the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_bitcpm.doctor import (
    Finding,
    ascend,
    diagnose,
    exit_code,
    machine,
    render_json,
    render_table,
    software,
    torch_facts,
)

HEALTHY = {
    "torch": {"version": "2.7.1+cpu", "file": "/x/torch/__init__.py", "threads": 4},
    "npu": None,
    "cuda": {"device_count": 0},
    "collectives": ["gloo"],
    "gloo": True,
    "platform": "cpu",
    "operators": {
        "requested": "auto",
        "cpu": {
            "backend": "native",
            "isa": "avx2",
            "isas": ["avx2", "generic"],
            "reason": "loaded",
            "load_error": None,
            "ops": ["abs_sums", "pack2"],
            "grids": ["ternary", "five"],
        },
        "npu": {
            "backend": "reference",
            "reason": "torch_npu is not imported in this process",
            "load_error": None,
            "device": None,
            "ops": [],
            "grids": [],
        },
        "other": {"backend": "reference", "reason": "no compiled kernels for other devices"},
    },
}


def with_npu(count: int, version: str = "2.7.1.post2") -> dict:
    npu = {"version": version, "is_available": True, "device_count": count}
    return {**HEALTHY, "npu": npu, "platform": "npu", "collectives": ["gloo", "hccl"]}


def versions(**installed: str):
    def version_of(name: str) -> str:
        try:
            return installed[name.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(name) from None

    return version_of


# -- torch in a process of its own ----------------------------------------------------------------


def environment(*folders: Path, **changes: str) -> dict[str, str]:
    repository = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, [*folders, repository]))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND_", "BITCPM_"))}
    return {**kept, "PYTHONPATH": path, **changes}


def fake_torch_npu(folder: Path, code: str, autoload: bool) -> Path:
    """A torch_npu package as pip would leave it, with or without its entry point."""
    package = folder / "torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    if autoload:
        info = folder / "torch_npu-2.7.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.7.1\n")
        (info / "entry_points.txt").write_text(
            "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
        )
    return folder


LIKE_WITHOUT_CANN = 'raise ImportError("libhccl.so: cannot open shared object file")\n'
LIKE_WITHOUT_DEVICES = """
import types, torch
__version__ = "2.13.0"
torch.npu = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 0)
"""


@pytest.mark.slow
def test_autoload_without_cann_kills_torch_and_the_doctor_survives(tmp_path):
    folder = fake_torch_npu(tmp_path, LIKE_WITHOUT_CANN, autoload=True)
    # The command itself, in a process where `import torch` fails.
    code = (
        "from megatron_bitcpm.doctor import diagnose, render_json\nprint(render_json(diagnose()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert found["torch"]["status"] == "problem"
    assert "libhccl.so" in found["torch"]["detail"]
    assert found["backend autoload"]["status"] == "problem"
    assert "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found["backend autoload"]["fix"]
    assert found["CANN"]["status"] == "problem"
    assert found["operators"]["status"] == "problem"
    assert found["Python"]["status"] == found["megatron-core"]["status"] == "ok"
    assert not [name for name, entry in found.items() if "the probe failed" in entry["detail"]]


@pytest.mark.slow
def test_autoload_switched_off_leaves_torch_usable(tmp_path):
    folder = fake_torch_npu(tmp_path, LIKE_WITHOUT_CANN, autoload=True)
    facts = torch_facts.ask_torch(environment(folder, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    assert facts["torch"]["threads"] > 0
    assert torch_facts.failure(facts, "npu").startswith("ImportError: libhccl.so")
    assert ascend.probe_torch_npu(facts, "2.7.1").status == "problem"


@pytest.mark.slow
def test_visible_devices_hide_all_npus_though_they_are_available(tmp_path):
    folder = fake_torch_npu(tmp_path, LIKE_WITHOUT_DEVICES, autoload=False)
    environ = environment(folder, ASCEND_RT_VISIBLE_DEVICES="8")
    facts = torch_facts.ask_torch(environ)
    assert facts["npu"] == {"version": "2.13.0", "is_available": True, "device_count": 0}
    found = ascend.probe_devices(environ, facts)
    assert (found.status, found.value) == ("problem", "0 NPU(s)")
    assert "ASCEND_RT_VISIBLE_DEVICES=8" in found.detail and "True all the same" in found.detail
    assert found.fix.startswith("unset ASCEND_RT_VISIBLE_DEVICES")


@pytest.mark.parametrize("code", ["import os; os._exit(7)", "import os; os.kill(os.getpid(), 11)"])
def test_a_torch_that_ends_the_process_is_a_finding(tmp_path, code):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    facts = torch_facts.ask_torch(environment(tmp_path))
    found = software.probe_torch(facts, "2.7.1")
    assert found.status == "problem" and "the process died" in found.detail
    assert software.probe_operators(facts).status == "problem"
    assert software.probe_collectives(facts).status == "problem"
    assert ascend.probe_devices({}, facts).status == "absent"


@pytest.mark.slow
def test_values_of_our_variables_are_tried():
    environ = environment(BITCPM_CPU_ISA="mmx", BITCPM_PLATFORM="npu")
    facts = torch_facts.ask_torch(environ)
    found = software.probe_variables(environ, facts)
    assert found.status == "problem" and found.fix == "unset BITCPM_PLATFORM BITCPM_CPU_ISA"
    assert "BITCPM_PLATFORM=npu: no such device" in found.detail
    assert "BITCPM_CPU_ISA=mmx: this processor" in found.detail
    assert software.probe_variables({"BITCPM_CPU_ISA": "avx2"}, HEALTHY).status == "ok"


def test_a_mistyped_variable_is_named():
    found = software.probe_variables({"BITCPM_CPU_IAS": "avx2"}, HEALTHY)
    assert found.status == "warn" and found.fix == "unset BITCPM_CPU_IAS, or use BITCPM_CPU_ISA"


# -- CANN -----------------------------------------------------------------------------------------


@pytest.fixture
def cann(tmp_path):
    """A toolkit's folder with the files that state its version."""
    home = tmp_path / "ascend-toolkit" / "latest"
    (home / "aarch64-linux").mkdir(parents=True)
    (home / "aarch64-linux" / "ascend_toolkit_install.info").write_text(
        "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001C23\n"
    )
    return home


def test_cann_of_this_user(cann):
    found = ascend.probe_cann({"ASCEND_HOME_PATH": str(cann)}, os.getuid(), True)
    assert (found.status, found.value) == ("ok", "8.3.RC1")


def test_cann_of_another_user_works_with_a_warning(cann):
    found = ascend.probe_cann({"ASCEND_HOME_PATH": str(cann)}, os.getuid() + 4321, True)
    assert (found.status, found.value) == ("warn", "8.3.RC1")
    assert "owner does not match" in found.detail and f"uid {os.getuid() + 4321}" in found.fix


def test_cann_that_may_not_be_read(cann):
    found = ascend.probe_cann(
        {"ASCEND_HOME_PATH": str(cann)}, os.getuid() + 4321, True, can_read=lambda path: False
    )
    assert found.status == "problem" and "chmod -R o+rX" in found.fix


def test_cann_installed_but_not_sourced(cann):
    for has_torch_npu, status in ((True, "problem"), (False, "warn")):
        found = ascend.probe_cann({}, 0, has_torch_npu, usual_homes=(cann,))
        assert found.status == status and found.fix == f"source {cann.parent}/set_env.sh"


def test_cann_absent(tmp_path):
    assert ascend.probe_cann({}, 0, False, usual_homes=()).status == "absent"
    assert ascend.probe_cann({}, 0, True, usual_homes=()).status == "problem"
    found = ascend.probe_cann({"ASCEND_HOME_PATH": str(tmp_path / "gone")}, 0, False)
    assert found.status == "problem" and "no such folder" in found.detail


def test_a_version_in_brackets_is_read(tmp_path):
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler" / "version.info").write_text("Version=[7.7.0.1.238:8.2.RC1]\n")
    assert ascend.read_cann_version(tmp_path) == "7.7.0.1.238"
    assert ascend.read_cann_version(tmp_path / "gone") is None


# -- devices, packages ----------------------------------------------------------------------------


def test_devices_and_ranks():
    assert ascend.probe_devices({}, HEALTHY).value == "CPU only"
    assert ascend.probe_devices({}, with_npu(8)).status == "ok"
    found = ascend.probe_devices({"LOCAL_WORLD_SIZE": "16"}, with_npu(8))
    assert found.status == "problem" and found.fix == "torchrun --nproc_per_node 8"
    assert "HwHiAiUser" in ascend.probe_devices({}, with_npu(0)).fix
    hidden = ascend.probe_devices({"ASCEND_RT_VISIBLE_DEVICES": ""}, with_npu(0))
    assert "(empty)" in hidden.detail


def test_torch_npu_of_another_torch():
    assert ascend.probe_torch_npu(with_npu(8), "2.7.1.post2").status == "ok"
    found = ascend.probe_torch_npu(with_npu(8, "2.5.1"), "2.5.1")
    assert found.status == "problem" and "torch==2.5.1" in found.fix
    assert ascend.probe_torch_npu(HEALTHY, None).status == "absent"


def test_driver():
    devices = [Path("/dev/davinci0")]
    assert ascend.probe_driver(None, []).status == "absent"
    assert ascend.probe_driver("/usr/bin/npu-smi", devices).status == "ok"
    assert ascend.probe_driver(None, devices).status == "warn"
    assert ascend.probe_driver("/usr/bin/npu-smi", []).status == "problem"


def test_the_web_toolkit_called_apex(tmp_path):
    (tmp_path / "apex" / "models").mkdir(parents=True)
    found = software.probe_apex(versions(apex="0.9.10.dev0"), tmp_path / "apex")
    assert found.status == "problem" and found.fix.startswith("pip uninstall apex")
    (tmp_path / "apex" / "optimizers").mkdir()
    assert software.probe_apex(versions(apex="0.1"), tmp_path / "apex").status == "ok"
    assert software.probe_apex(versions(), None).status == "absent"


def test_megatron_versions():
    tested = ("0.12.1", "0.16.")
    for version, status in (("0.12.1", "ok"), ("0.16.3", "ok"), ("0.14.0", "problem")):
        found = software.probe_megatron(versions(megatron_core=version), tested, "/x")
        assert found.status == status and (status == "ok" or "0.16.1" in found.fix)
    assert software.probe_megatron(versions(), tested, None).status == "problem"
    assert software.probe_megatron(versions(megatron_core="0.16.1"), tested, None).status == (
        "problem"
    )


def test_mindspeed_wants_its_megatron(tmp_path):
    core = {"mindspeed": "0.12.1", "megatron_core": "0.16.1"}
    assert software.probe_mindspeed(versions(**core), tmp_path).status == "warn"
    core["megatron_core"] = "0.12.1"
    assert software.probe_mindspeed(versions(**core), tmp_path).status == "ok"
    assert software.probe_mindspeed(versions(), None).status == "absent"


def test_requirements_that_are_not_met():
    declared = ["torch>=2.6", "numpy", "pydantic>=2.7", 'pytest; extra == "dev"', "einops"]
    found = software.probe_requirements(declared, versions(numpy="2.0", pydantic="1.10"))
    assert found.status == "problem"
    assert found.detail == "pydantic>=2.7 (1.10), einops (absent)"
    assert found.fix == 'pip install "pydantic>=2.7" "einops"'
    met = versions(numpy="2.0", pydantic="2.7", einops="1")
    assert software.probe_requirements(declared, met).status == "ok"


def test_which_operators_are_live():
    found = software.probe_operators(HEALTHY)
    assert found.value == "native on cpu, avx2"
    assert found.detail == (
        "loaded; this processor: avx2 generic; compiled: abs_sums pack2; grids: ternary five"
    )
    found = software.probe_operators(with_npu(8))
    assert (found.status, found.value) == ("warn", "reference on npu")
    assert "docs/ascend.md" in found.fix
    broken = {"backend": "reference", "isa": None, "reason": "r", "load_error": "ImportError: x"}
    facts = {**HEALTHY, "operators": {"cpu": broken, "other": broken}}
    found = software.probe_operators(facts)
    assert found.status == "warn" and "ImportError: x" in found.detail and "g++" in found.fix


def test_npu_operators():
    found = ascend.probe_npu_operators(HEALTHY)
    assert (found.status, found.detail) == ("absent", "torch_npu is not imported in this process")
    facts = with_npu(8)
    broken = {
        **HEALTHY["operators"]["npu"],
        "reason": "compiled module did not load",
        "load_error": "ModuleNotFoundError: No module named 'megatron_bitcpm._npu'",
    }
    facts = {**facts, "operators": {**HEALTHY["operators"], "npu": broken}}
    found = ascend.probe_npu_operators(facts)
    assert (found.status, found.value) == ("warn", "reference")
    assert "ModuleNotFoundError" in found.detail and "docs/ascend.md" in found.fix
    device = {"vector_cores": 48, "ub_bytes": 196608}
    live = {**broken, "backend": "native", "load_error": None, "device": device, "ops": ["pack2"]}
    found = ascend.probe_npu_operators(
        {**facts, "operators": {**HEALTHY["operators"], "npu": live}}
    )
    assert (found.status, found.value) == ("ok", "native, 48 vector cores, 196608 bytes each")
    assert "pack2" in found.detail
    assert ascend.probe_npu_operators({"torch": "failed: x"}).status == "absent"


def test_collectives():
    assert software.probe_collectives(HEALTHY).status == "ok"
    facts = {**with_npu(8), "collectives": ["gloo"]}
    assert "hccl is missing" in software.probe_collectives(facts).detail
    facts = {**HEALTHY, "gloo": "failed: RuntimeError: no address"}
    found = software.probe_collectives(facts)
    assert found.status == "problem" and "/etc/hosts" in found.fix


# -- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "cores", "status", "fix"),
    [
        ({}, 8, "ok", ""),
        ({"OMP_NUM_THREADS": "8"}, 8, "ok", ""),
        ({"OMP_NUM_THREADS": "4,2"}, 4, "ok", ""),
        ({"OMP_NUM_THREADS": "1"}, 8, "warn", "export OMP_NUM_THREADS=8"),
        ({"OMP_NUM_THREADS": "8", "LOCAL_WORLD_SIZE": "4"}, 8, "warn", "export OMP_NUM_THREADS=2"),
        ({"LOCAL_WORLD_SIZE": "4"}, 8, "warn", "export OMP_NUM_THREADS=2"),
        ({"OMP_NUM_THREADS": "all"}, 8, "problem", "export OMP_NUM_THREADS=8"),
    ],
)
def test_threads(environ, cores, status, fix):
    found = machine.probe_threads(environ, cores)
    assert (found.status, found.fix) == (status, fix)


LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("environ", "status", "says"),
    [
        ({}, "absent", ""),
        (LAUNCHED, "ok", ""),
        ({"WORLD_SIZE": "8"}, "problem", "without RANK LOCAL_RANK MASTER_ADDR MASTER_PORT"),
        ({**LAUNCHED, "RANK": "2"}, "problem", "RANK is not below WORLD_SIZE"),
        ({**LAUNCHED, "RANK": "x"}, "problem", "RANK is not a number"),
    ],
)
def test_launcher(environ, status, says):
    found = machine.probe_launcher(environ)
    assert found.status == status and says in found.detail


def test_memory_of_a_machine_and_of_a_container(tmp_path):
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:  64000000 kB\nMemFree: 1 kB\nMemAvailable:   32000000 kB\n")
    assert machine.probe_memory(meminfo, limit).value == "32.8 of 65.5 GB available"
    limit.write_text("max\n")
    assert machine.probe_memory(meminfo, limit).status == "ok"
    limit.write_text("2000000000\n")
    found = machine.probe_memory(meminfo, limit)
    assert (found.status, found.value) == ("warn", "2.0 of 2.0 GB available")


@pytest.mark.parametrize(("total", "status"), [(64e6, "warn"), (8e9, "ok")])
def test_shared_memory_of_a_container(tmp_path, monkeypatch, total, status):
    usage = SimpleNamespace(total=total, free=total)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    found = machine.probe_shared_memory(tmp_path)
    assert found.status == status and bool(found.fix) == (status == "warn")
    assert machine.probe_shared_memory(tmp_path / "gone").status == "warn"
    assert machine.probe_disk(tmp_path).status == "warn"


def test_cpu_names_its_instruction_sets(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("model name : Kunpeng\nFeatures : fp asimd sve\n\nmodel name : second\n")
    found = machine.probe_cpu(path, "aarch64", 64)
    assert found.value == "aarch64, 64 core(s)" and found.detail == "Kunpeng; asimd sve"
    assert machine.probe_cpu(tmp_path / "gone", "arm64", 2).status == "ok"


def test_tools(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("#!/bin/sh\necho good 1.2\n")
    bad.write_text("#!/bin/sh\nexit 3\n")
    for path in (good, bad):
        path.chmod(0o755)
    assert machine.probe_tool("good", lambda name: str(good), "u", "f").value == "good 1.2"
    assert machine.probe_tool("bad", lambda name: str(bad), "u", "f").status == "problem"
    assert machine.probe_tool("none", lambda name: None, "u", "f").status == "absent"


def test_an_old_python():
    assert machine.probe_python((3, 9, 1), "/usr/bin/python").status == "problem"
    assert machine.probe_python((3, 11, 7), "/usr/bin/python").status == "ok"


# -- all together ---------------------------------------------------------------------------------


def test_this_machine_and_a_probe_that_breaks(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(machine, "probe_disk", broken)
    found = diagnose(environment())
    assert found["disk"].status == "warn" and "ZeroDivisionError: oops" in found["disk"].detail
    assert found["torch"].status == found["collectives"].status == "ok"
    assert found["operators"].status == "ok" and found["operators"].value.startswith("native")
    assert list(found)[-1] == "bisheng", "the other probes went on"
    assert all(f.fix for f in found.values() if f.status in ("warn", "problem"))


def test_importing_the_doctor_loads_no_torch():
    code = (
        "import sys, megatron_bitcpm.doctor; "
        "sys.exit(bool({'torch', 'numpy', 'megatron.core'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_output_and_exit_code():
    fine = {"a": Finding("ok", "1"), "bb": Finding("warn", "2", "d " * 60, "f")}
    bad = {**fine, "c": Finding("problem", "3", fix="do this")}
    assert (exit_code(fine), exit_code(bad)) == (0, 1)
    table = render_table(bad)
    assert max(map(len, table.splitlines())) <= 100
    assert "problem  c   3\n             fix: do this\n" in table
    assert table.endswith("1 problem(s), 1 warning(s)")
    assert json.loads(render_json(bad))[2] == {
        "name": "c",
        "status": "problem",
        "value": "3",
        "detail": "",
        "fix": "do this",
    }
