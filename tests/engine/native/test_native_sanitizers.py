"""The sanitizers find nothing while random programs run on buffers that are exact to the byte."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from remelt.engine import native

SOURCES = ("program", "interpreter", "stages", "operations_plain", "operations_avx2", "operations_avx512")
FLAGS = ["-std=c11", "-O1", "-g", "-ffp-contract=off", "-fno-omit-frame-pointer"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, compiled with the sanitizers."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name == "nt":
        pytest.skip("there is no compiler with sanitizers")
    folder = Path(native.__file__).parent
    target = tmp_path_factory.mktemp("fuzz") / "fuzz_native"
    files = [str(folder / f"{name}.c") for name in SOURCES] + [str(Path(__file__).with_name("fuzz_native.c"))]
    if not all(map(os.path.exists, files)):
        pytest.skip("the installation has no sources")
    command = [compiler, *FLAGS, *SANITIZERS, f"-I{folder}", *files, "-lm", "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr
    return target


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_random_programs_run_clean_under_the_sanitizers(fuzzer: Path, seed: int) -> None:
    found = subprocess.run([str(fuzzer), str(seed), "4"], capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "programs ran" in found.stdout
