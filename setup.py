"""Builds the compiled operators; everything else is declared in pyproject.toml.

`megatron_bitcpm._cpu` links no torch, so one build serves every version of it. kernels.cpp is
compiled once per instruction set and the set is chosen when the module is loaded. Without a
compiler the package still installs, says so once, and runs on its pure-torch reference.
The Ascend operators (csrc/ascend) will be built from here too, where the CANN toolkit is present.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
# One object file of kernels.cpp each; the order of preference is in module.cpp.
ISA_FLAGS: dict[str, list[str]] = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2"]
    # At least 512 bits also for loops the compiler vectorises by itself.
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    ISA_FLAGS["avx512"] = [*avx512, "-mprefer-vector-width=512"]
OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildPerIsa(build_ext):
    """build_ext that adds the per-instruction-set objects, and survives a missing compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Compile kernels.cpp once per instruction set, then build the module with the objects."""
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
            sources=[str(CPU_SOURCES / "module.cpp")],
            include_dirs=[pybind11.get_include()],
            depends=[*headers, str(CPU_SOURCES / "kernels.cpp")],
            extra_compile_args=[*COMMON_FLAGS, *OPENMP_FLAGS],
            extra_link_args=OPENMP_FLAGS,
            language="c++",
            # Lets the install go on when the file was not built.
            optional=True,
        )
    ]


setup(ext_modules=list_extensions(), cmdclass={"build_ext": BuildPerIsa})
