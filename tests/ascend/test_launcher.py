"""How the NPU module is built: when setup.py builds it, what CMake and bisheng are asked, and that
the launchers fit torch-npu's headers. CANN is imitated by a folder with stand-ins for its programs.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.host_check import ROOT, require_tools

OPERATORS = ("abs_sums", "fake_quantize", "fake_quantize_with_scales", "pack2")
HOST_COMPILER = shutil.which("g++")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def cann(tmp_path: Path) -> Path:
    """Return a folder that looks like ASCEND_HOME_PATH."""
    home = tmp_path / "cann"
    write_program(home / f"{platform.machine()}-linux/ccec_compiler/bin/bisheng", "exit 1")
    return home


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a cmake that writes down what it is asked, and a torch_npu."""
    write_program(
        tmp_path / "bin/cmake",
        f'echo "$@" >> {tmp_path}/cmake-calls\n'
        'for word in "$@"; do case $word in\n'
        '  -DBITCPM_OUTPUT=*) touch "${word#-DBITCPM_OUTPUT=}" ;;\n'
        "esac; done\n"
        f'if [ "$1" = "$CMAKE_FAILS_AT" ]; then echo "a long message"; exit 7; fi',
    )
    modules = tmp_path / "modules/torch_npu"
    modules.mkdir(parents=True)
    (modules / "__init__.py").write_text("raise ImportError('needs a device')", encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ASCEND")}
    return {
        **kept,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(modules.parent),
        # The CPU operators are not the subject: their compiler is missing, which is no error.
        "CC": "/nonexistent/cc",
        "CXX": "/nonexistent/c++",
        "BITCPM_REQUIRE_NATIVE": "",
    }


def run_setup(folder: Path, environ: dict[str, str], **changes: str) -> tuple[int, str, list[str]]:
    """Run setup.py; return the exit code, the output, and the calls of cmake."""
    folders = (f"--build-lib={folder}/lib", f"--build-temp={folder}/temp")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env={**environ, **changes},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    calls = folder / "cmake-calls"
    return done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else []


def test_setup_is_silent_without_cann(tmp_path: Path, environ: dict[str, str]) -> None:
    code, output, calls = run_setup(tmp_path, environ)
    assert code == 0 and calls == []
    assert "NPU" not in output and "ASCEND" not in output


@pytest.mark.slow
def test_setup_calls_cmake(tmp_path: Path, environ: dict[str, str], cann: Path) -> None:
    (tmp_path / "lib/megatron_bitcpm").mkdir(parents=True)
    code, output, calls = run_setup(tmp_path, environ, ASCEND_HOME_PATH=str(cann))
    assert code == 0, output
    configure, build = calls
    assert configure.startswith(f"-S {ROOT}/csrc/ascend -B {tmp_path}/temp")
    words = dict(w[2:].split("=", 1) for w in configure.split() if w.startswith("-D"))
    assert words["CMAKE_CXX_COMPILER"].startswith(str(cann))
    assert words["CMAKE_CXX_COMPILER"].endswith("ccec_compiler/bin/bisheng")
    assert words["BITCPM_CANN"] == str(cann)
    assert words["BITCPM_TORCH_NPU"] == str(tmp_path / "modules/torch_npu")
    assert (Path(words["BITCPM_TORCH"]) / "include/ATen/ATen.h").is_file()
    assert (Path(words["BITCPM_PYTHON_INCLUDE"]) / "Python.h").is_file()
    assert words["BITCPM_CXX11_ABI"] == "1"
    output_file = Path(words["BITCPM_OUTPUT"])
    assert output_file.parent == tmp_path / "lib/megatron_bitcpm"
    assert output_file.name.startswith("_npu.") and output_file.name.endswith(".so")
    assert build.startswith(f"--build {tmp_path}/temp")


@pytest.mark.parametrize(("step", "name"), [("-S", "cmake -S"), ("--build", "cmake --build")])
@pytest.mark.slow
def test_setup_fails_in_one_line_with_cmake(
    tmp_path: Path, environ: dict[str, str], cann: Path, step: str, name: str
) -> None:
    (tmp_path / "lib/megatron_bitcpm").mkdir(parents=True)
    environ |= {"ASCEND_HOME_PATH": str(cann), "CMAKE_FAILS_AT": step}
    code, output, _ = run_setup(tmp_path, environ)
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert last == f"the NPU operators were not built: `{name}` ended with exit code 7"
    assert "Traceback" not in output and "a long message" in output


@pytest.mark.parametrize("required", ["", "1"])
def test_setup_says_what_is_missing(
    tmp_path: Path, environ: dict[str, str], cann: Path, required: str
) -> None:
    environ |= {"BITCPM_REQUIRE_NPU": required, "ASCEND_HOME_PATH": str(tmp_path / "empty")}
    without_torch_npu = {"ASCEND_HOME_PATH": str(cann), "PYTHONPATH": ""}
    reasons = {
        f"ASCEND_HOME_PATH={tmp_path}/empty holds no bisheng": {},
        "torch_npu cannot be imported by the build": without_torch_npu,
    }
    for reason, changes in reasons.items():
        code, output, calls = run_setup(tmp_path, environ, **changes)
        lines = [line for line in output.splitlines() if reason in line]
        assert len(lines) == 1 and "docs/ascend.md" in lines[0], output
        assert (code == 1 and "Traceback" not in output) if required else code == 0
        assert calls == []


def test_required_without_cann_is_an_error(tmp_path: Path, environ: dict[str, str]) -> None:
    code, output, _ = run_setup(tmp_path, environ, BITCPM_REQUIRE_NPU="1")
    assert code == 1
    assert "BITCPM_REQUIRE_NPU is set, but ASCEND_HOME_PATH is not set" in output


# -- CMake itself ---------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, cann: Path) -> tuple[list[str], Path]:
    """Return cmake's arguments for a tree in which every compiler is a stand-in, and its log."""
    require_tools("cmake", "g++")
    log = tmp_path / "bisheng-calls"
    # Sources of this project become empty objects; CMake's own trials are really compiled.
    write_program(
        cann / "bin/bisheng",
        f'case "$*" in\n'
        f'  *{ROOT}/csrc/ascend/*) echo "$@" >> {log}; mode=compile ;;\n'
        f'  *libtest_npu*) echo "$@" >> {log}; mode=link ;;\n'
        f'  *) exec {HOST_COMPILER} "$@" ;;\n'
        "esac\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done\n'
        f'echo | {HOST_COMPILER} -x c++ -c - -o "$output"',
    )
    header = cann / "include/tiling/platform/platform_ascendc.h"
    header.parent.mkdir(parents=True)
    header.touch()
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": cann / "bin/bisheng",
        "BITCPM_CANN": cann,
        "BITCPM_TORCH": tmp_path / "torch",
        "BITCPM_TORCH_NPU": tmp_path / "torch_npu",
        "BITCPM_PYTHON_INCLUDE": tmp_path / "python",
        "BITCPM_CXX11_ABI": 1,
        "BITCPM_OUTPUT": tmp_path / "out/libtest_npu.so",
    }
    words = ["-S", str(ROOT / "csrc/ascend"), "-B", str(tmp_path / "cmake")]
    return [*words, *(f"-D{key}={value}" for key, value in definitions.items())], log


def run_cmake(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["cmake", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def test_cmake_compiles_kernels_as_ascend_c(
    tmp_path: Path, project: tuple[list[str], Path]
) -> None:
    arguments, log = project
    for words in (arguments, ["--build", str(tmp_path / "cmake")]):
        done = run_cmake(*words)
        assert done.returncode == 0, done.stdout
    assert (tmp_path / "out/libtest_npu.so").is_file()
    *compiles, link = log.read_text().splitlines()
    calls = {call.split()[-1].removeprefix(f"{ROOT}/csrc/ascend/"): call for call in compiles}
    kernels = {f"{name}/op_kernel/{name}.cpp" for name in OPERATORS}
    launchers = {f"{name}/op_host/launch.cpp" for name in OPERATORS}
    assert set(calls) == {*kernels, *launchers, "module.cpp", "queue.cpp", "platform.cpp"}
    for source, call in calls.items():
        assert "-fPIC" in call and "-std=c++17" in call
        if source in kernels:
            assert "-xasc --npu-arch=dav-2201" in call and "-ffp-contract=off" in call
            assert "torch" not in call.replace(str(ROOT), "") and "-fvisibility" not in call
        else:
            assert "-xasc" not in call and "-D_GLIBCXX_USE_CXX11_ABI=1" in call
            assert f"{tmp_path}/torch_npu/include" in call and f"{tmp_path}/python" in call
    for library in ("torch_npu", "torch_python", "c10", "ascendcl", "platform"):
        assert f" -l{library} " in f"{link} "
    assert "rpath" not in link


def test_cmake_names_what_is_missing(project: tuple[list[str], Path], cann: Path) -> None:
    arguments, _ = project
    done = run_cmake(*(word for word in arguments if "BITCPM_TORCH_NPU" not in word))
    assert done.returncode and "BITCPM_TORCH_NPU is not set" in done.stdout
    shutil.rmtree(cann / "include")
    done = run_cmake(*arguments)
    assert done.returncode and "no tiling/platform/platform_ascendc.h in" in done.stdout


# -- what CANN reports ----------------------------------------------------------------------------

# The part of CANN's header that platform.cpp uses, as its documentation declares it.
PLATFORM_HEADER = """
#include <cstdint>
namespace platform_ascendc {
enum class CoreMemType { L0_A = 0, UB = 5 };
enum class SocVersion { ASCEND910 = 0, ASCEND910B, ASCEND310P, ASCEND910_93 = 12 };
struct PlatformAscendC {
  uint32_t GetCoreNumAiv() const { return CORES; }
  void GetCoreMemSize(const CoreMemType& type, uint64_t& size) const {
    size = type == CoreMemType::UB ? 196608 : 1;
  }
  SocVersion GetSocVersion() const { return SocVersion::SOC; }
};
struct PlatformAscendCManager {
  static PlatformAscendC* GetInstance() { static PlatformAscendC it; return &it; }
};
}
"""
PRINT_DEVICE = """
#include <cstdio>
#include <exception>
#include "platform.h"
int main() try {
  const auto& device = bitcpm::ascend::get_device();
  std::printf("%u %u", device.vector_cores, device.ub_bytes);
} catch (const std::exception& error) { std::printf("%s", error.what()); }
"""


@pytest.mark.parametrize(
    ("soc", "cores", "expected"),
    [
        ("ASCEND910B", 40, "40 196608"),
        ("ASCEND910_93", 48, "48 196608"),
        ("ASCEND910B", 0, "CANN reports no vector cores or no unified buffer"),
        ("ASCEND310P", 8, "the kernels are for Ascend 910B and 910C only"),
    ],
)
def test_device_is_what_the_platform_reports(
    tmp_path: Path, soc: str, cores: int, expected: str
) -> None:
    require_tools("g++")
    header = tmp_path / "tiling/platform/platform_ascendc.h"
    header.parent.mkdir(parents=True)
    header.write_text(PLATFORM_HEADER)
    (tmp_path / "main.cpp").write_text(PRINT_DEVICE)
    sources = ROOT / "csrc/ascend"
    subprocess.run(
        [
            HOST_COMPILER,
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-DSOC={soc}",
            f"-DCORES={cores}",
            f"-I{sources}",
            f"-I{tmp_path}",
            sources / "platform.cpp",
            tmp_path / "main.cpp",
            "-o",
            tmp_path / "main",
        ],
        check=True,
    )
    assert subprocess.check_output([tmp_path / "main"], text=True) == expected


# -- torch-npu's headers --------------------------------------------------------------------------


def compile_launchers(sources: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [ROOT / ".ci/compile-launcher", sources],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("find", "replace", "complaint"),
    [
        ("RunOpApi(", "RunOpApy(", "RunOpApy"),
        # Declared by the headers, not exported by the library.
        (
            "return format == ACL_FORMAT_ND ||",
            "return at_npu::native::FormatHelper::IsBaseFormatType(tensor) ||",
            "no library exports what the launchers call",
        ),
    ],
)
def test_launcher_check_can_fail(tmp_path: Path, find: str, replace: str, complaint: str) -> None:
    sources = tmp_path / "csrc/ascend"
    sources.mkdir(parents=True)
    shutil.copytree(ROOT / "csrc/common", tmp_path / "csrc/common")
    shutil.copytree(ROOT / "csrc/ascend/common", sources / "common")
    (sources / "queue.h").write_text((ROOT / "csrc/ascend/queue.h").read_text())
    text = (ROOT / "csrc/ascend/queue.cpp").read_text()
    assert find in text
    (sources / "queue.cpp").write_text(text)
    clean = compile_launchers(sources)
    if clean.returncode and not list((ROOT / "build/torch-npu").glob("*/complete")):
        assert os.environ.get("BITCPM_REQUIRE_BACKENDS") != "1", clean.stdout
        pytest.skip(f"torch-npu's wheel cannot be had here: {clean.stdout.splitlines()[-1]}")
    assert clean.returncode == 0, clean.stdout
    (sources / "queue.cpp").write_text(text.replace(find, replace))
    broken = compile_launchers(sources)
    assert broken.returncode and complaint in broken.stdout
