"""Builds the compiled operators; everything else is declared in pyproject.toml.

`megatron_bitcpm._cpu` links no torch, so one build serves every version of it. kernels.cpp is
compiled once per instruction set and the set is chosen when the module is loaded. Without a
compiler the package still installs, says so once, and runs on its pure-torch reference.
`megatron_bitcpm._npu` is built where the CANN toolkit is present: csrc/ascend/build_npu.py.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# A build backend does not put this folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc" / "ascend"))
import build_npu

CPU_SOURCES = Path("csrc/cpu")
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Contraction would fuse a * b + c and change results between instruction sets.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
# One object file of kernels.cpp each; isa.cpp lists the same sets, in order of preference, and
# csrc/cpu/checks/Makefile builds them with the same flags.
ISA_FLAGS: dict[str, list[str]] = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2"]
    # At least 512 bits also for loops the compiler vectorises by itself.
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    ISA_FLAGS["avx512"] = [*avx512, "-mprefer-vector-width=512"]
elif platform.machine().lower() in ("aarch64", "arm64"):
    ISA_FLAGS["neon"] = []
    if sys.platform == "linux":
        ISA_FLAGS["generic"] = ["-march=armv8-a+nosimd"]
OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildPerIsa(build_ext):
    """build_ext that adds the per-instruction-set objects, and survives a missing compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Compile kernels.cpp once per instruction set, then build the module with the objects."""
        if ext.name == build_npu.MODULE:
            build_npu.build(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "npu")
            return
        try:
            for isa, flags in ISA_FLAGS.items():
                ext.extra_objects += self.compiler.compile(
                    [str(CPU_SOURCES / "kernels.cpp")],
                    output_dir=str(Path(self.build_temp) / isa),
                    macros=[("BITCPM_GET_KERNELS", f"get_kernels_{isa}")],
                    extra_postargs=[*COMMON_FLAGS, *flags],
                    depends=ext.depends,
                )
            super().build_extension(ext)
        except Exception as error:
            if os.environ.get("BITCPM_REQUIRE_NATIVE"):
                raise
            message = f"the CPU operators were not built ({error}); "
            self.warn(message + "megatron_bitcpm will run on its pure-torch reference")


def list_extensions() -> list[Extension]:
    """Return the extensions to build; none where pybind11 is absent."""
    try:
        import pybind11
    except ImportError:
        print("pybind11 is absent: megatron_bitcpm will run on its pure-torch reference")
        return []
    headers = [str(path) for path in Path("csrc").glob("*/*.h")]
    return [
        Extension(
            "megatron_bitcpm._cpu",
            sources=[str(CPU_SOURCES / name) for name in ("module.cpp", "threads.cpp", "isa.cpp")],
            include_dirs=[pybind11.get_include()],
            depends=[*headers, str(CPU_SOURCES / "kernels.cpp")],
            extra_compile_args=[*COMMON_FLAGS, *OPENMP_FLAGS],
            extra_link_args=OPENMP_FLAGS,
            language="c++",
            # Lets the install go on when the file was not built.
            optional=True,
        )
    ]


def list_npu_extensions() -> list[Extension]:
    """Return the module of the NPU operators where it can be built."""
    return [Extension(build_npu.MODULE, sources=[])] if build_npu.should_build() else []


setup(ext_modules=[*list_extensions(), *list_npu_extensions()], cmdclass={"build_ext": BuildPerIsa})
