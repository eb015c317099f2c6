"""The native executor's build; everything else stands in pyproject.toml.

Where no compiler is, the installation goes on without it, and merging uses torch. REMELT_NATIVE=0 leaves it out.
"""

from __future__ import annotations

import logging
import os
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = (
    *("module", "memory", "objects", "calls", "program", "interpreter", "stages"),
    *("operations_plain", "operations_avx2", "operations_avx512"),
)
HEADERS = ("language", "interface", "stages", "lanes_plain", "lanes_avx2", "lanes_avx512", "operations", "reductions")
FOLDER = "src/remelt/engine/native"
OLDEST = "0x030B0000"
WANTED = os.environ.get("REMELT_NATIVE") != "0"
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded builds have no stable interface of C

GNU = [
    "-O3",
    "-g0",
    "-std=c11",
    "-fvisibility=hidden",
    # One rounding for each operation that is written: results are the same bits on every machine.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
MICROSOFT = ["/O2", "/std:c11", "/fp:precise"]


class BuildNative(build_ext):
    """Compiles with the flags of the compiler that is found; says what it means where that fails."""

    def build_extensions(self) -> None:
        flags = MICROSOFT if self.compiler.compiler_type == "msvc" else GNU
        for extension in self.extensions:
            extension.extra_compile_args = flags
        super().build_extensions()
        for extension in self.extensions:
            if not os.path.exists(self.get_ext_fullpath(extension.name)):
                logging.warning("remelt is installed without its native executor: merging uses torch")


native = Extension(
    "remelt.engine.native._native",
    [f"{FOLDER}/{name}.c" for name in SOURCES],
    depends=[f"{FOLDER}/{name}.h" for name in HEADERS],
    define_macros=[("Py_LIMITED_API", OLDEST)] if STABLE else [],
    py_limited_api=STABLE,
    optional=True,
)

setup(
    ext_modules=[native] if WANTED else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if WANTED and STABLE else {},
)
