"""Builds `megatron_bitcpm._npu` with CMake and CANN's bisheng; setup.py calls it.

Environment: `ASCEND_HOME_PATH` (CANN's set_env.sh sets it) says where CANN is; without it nothing
is built and nothing said. `BITCPM_REQUIRE_NPU=1` makes it an error when the module cannot be built.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

MODULE = "megatron_bitcpm._npu"
SOURCES = Path(__file__).resolve().parent


def find_bisheng(home: Path) -> Path | None:
    """Return CANN's compiler below `home` (ASCEND_HOME_PATH), or on the PATH."""
    folders = (f"{platform.machine()}-linux/ccec_compiler/bin", "compiler/ccec_compiler/bin", "bin")
    for folder in folders:
        if os.access(home / folder / "bisheng", os.X_OK):
            return home / folder / "bisheng"
    found = shutil.which("bisheng")
    return Path(found) if found else None


def find_obstacle() -> str | None:
    """Return why the module cannot be built here, one line, or None.

    Raises:
        SystemExit: it cannot, and `BITCPM_REQUIRE_NPU` is set.
    """
    home = os.environ.get("ASCEND_HOME_PATH", "")
    if not home:
        obstacle = "ASCEND_HOME_PATH is not set"
    elif find_bisheng(Path(home)) is None:
        obstacle = f"ASCEND_HOME_PATH={home} holds no bisheng"
    elif shutil.which("cmake") is None:
        obstacle = "there is no cmake"
    else:
        absent = [name for name in ("torch", "torch_npu") if not importlib.util.find_spec(name)]
        obstacle = f"{' and '.join(absent)} cannot be imported by the build" if absent else ""
    if obstacle and os.environ.get("BITCPM_REQUIRE_NPU", "0") not in ("", "0"):
        raise SystemExit(f"BITCPM_REQUIRE_NPU is set, but {obstacle}; see docs/ascend.md")
    return obstacle or None


def should_build() -> bool:
    """Tell whether to build; say why not where CANN is named but something is missing."""
    obstacle = find_obstacle()
    if obstacle and os.environ.get("ASCEND_HOME_PATH"):
        print(f"the NPU operators are not built: {obstacle}; see docs/ascend.md")
    return obstacle is None


def build(output: Path, build_folder: Path) -> None:
    """Build the module.

    Args:
        output: path of the file to make.
        build_folder: where CMake works.

    Raises:
        SystemExit: CMake failed; its own messages have been printed.
    """
    home = Path(os.environ["ASCEND_HOME_PATH"])
    variables = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": find_bisheng(home),
        "BITCPM_CANN": home,
        "BITCPM_TORCH": _locate("torch"),
        "BITCPM_TORCH_NPU": _locate("torch_npu"),
        "BITCPM_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "BITCPM_CXX11_ABI": _ask_cxx11_abi(),
        "BITCPM_OUTPUT": output.resolve(),
    }
    definitions = [f"-D{key}={value}" for key, value in variables.items()]
    _run(["cmake", "-S", str(SOURCES), "-B", str(build_folder), *definitions])
    _run(["cmake", "--build", str(build_folder), "--parallel", str(os.cpu_count() or 1)])


def _run(command: list[str]) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        step = " ".join(command[:2])
        raise SystemExit(f"the NPU operators were not built: `{step}` ended with exit code {code}")


def _locate(module: str) -> Path:
    """Return the folder of an installed package without importing it: torch_npu needs a device."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the NPU operators were not built: {module} is not installed")
    return Path(spec.origin).parent


def _ask_cxx11_abi() -> int:
    """Ask torch for the C++ ABI it was built with, in a process that does not load torch_npu."""
    environ = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    question = "import torch; print(int(torch.compiled_with_cxx11_abi()))"
    done = subprocess.run(
        [sys.executable, "-c", question], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise SystemExit(f"the NPU operators were not built: torch does not import ({last})")
    return int(done.stdout)
