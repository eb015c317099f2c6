"""What tells the work of one run from that of another: the code of plugins, with all that they import."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import remelt as rm
from remelt.api.fingerprint import code_digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which modules are imported; they are forgotten after the test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "") or ""):
            del sys.modules[name]


def digest(folder: Path, source: str) -> str | None:
    """The digest of a plugin's code, loaded anew."""
    for name in [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]
    (folder / "plug_for_digests.py").write_text(source)
    importlib.invalidate_caches()
    return code_digest(importlib.import_module("plug_for_digests"))


@pytest.mark.parametrize(
    "source",
    [
        "from helper_for_digests import F\n",
        "import helper_for_digests as h\n",
        "def method():\n    from helper_for_digests import F\n    return F\n",
        "from package_for_digests import F\n",
        "from package_for_digests import inner\n",
        "import package_for_digests.inner\n",
        "def method():\n    import package_for_digests.inner\n",
        "if True:\n    from package_for_digests.inner import *\n",
    ],
)
def test_code_that_a_plugin_imports_in_any_way_is_part_of_it(folder: Path, source: str) -> None:
    package = folder / "package_for_digests"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import F\n")
    (package / "inner.py").write_text("from helper_for_digests import F\n")
    (folder / "helper_for_digests.py").write_text("F = 1.0\n")
    before = digest(folder, source)
    assert before is not None
    assert digest(folder, source) == before
    (folder / "helper_for_digests.py").write_text("F = 2.0\n")
    assert digest(folder, source) not in (before, None)


def test_code_that_is_not_imported_is_no_part_of_it(folder: Path) -> None:
    (folder / "helper_for_digests.py").write_text("F = 1.0\n")
    before = digest(folder, "import math\nimport torch\n")
    (folder / "helper_for_digests.py").write_text("F = 2.0\n")
    assert before is not None
    assert digest(folder, "import math\nimport torch\n") == before


@pytest.mark.parametrize(
    "source",
    [
        "import importlib\nh = importlib.import_module('math')\n",
        "__import__('math')\n",
        "exec('F = 1')\n",
        "try:\n    import nothing_for_digests\nexcept ImportError:\n    pass\n",
        "def method():\n    return open('table')\n",
        "from pathlib import Path\n\ndef method():\n    return Path('table').read_text()\n",
    ],
)
def test_where_it_cannot_be_told_what_a_plugin_runs_there_is_no_digest(folder: Path, source: str) -> None:
    assert digest(folder, source) is None


def test_code_typed_in_has_no_digest() -> None:
    assert code_digest(None) is None


def test_a_script_is_told_by_its_file(tmp_path: Path) -> None:
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("F = 1.0\n")
    before = code_digest(script)
    Path(script.__file__).write_text("F = 2.0\n")
    assert before is not None
    assert code_digest(script) not in (before, None)


PLUGIN = """from __future__ import annotations
import os
from helper_of_plugin import F
from remelt.recipe.method import Same, merge_method


@merge_method(cut="element")
def times_factor(a: Same, *, key: str) -> Same:
    '''The tensor times F.'''
    if key == os.environ.get("BREAK"):
        raise ValueError("broken on purpose")
    return a * F
"""
RUN = """import remelt as rm
from pathlib import Path
from remelt.methods import METHODS
METHODS.add_file(Path("plug.py"))
rm.merge("mix.mecha", output="out.safetensors", threads=1)
"""


def test_a_merge_is_not_continued_with_other_code(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    write_model(tmp_path / "a", {f"w{number}": torch.ones(4) for number in range(8)})
    (tmp_path / "mix.mecha").write_text('version 1\ntimes_factor("a")\n')
    (tmp_path / "plug.py").write_text(PLUGIN)
    (tmp_path / "helper_of_plugin.py").write_text("F = 1.0\n")
    source = Path(rm.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(**more: str) -> int:
        command = [sys.executable, "-c", RUN]
        options = {"cwd": tmp_path, "env": {**environment, **more}, "capture_output": True}
        return subprocess.run(command, check=False, **options).returncode  # type: ignore[call-overload,no-any-return]

    assert run(BREAK="w5") != 0
    assert len((tmp_path / "out.safetensors.journal").read_bytes().splitlines()) > 1
    (tmp_path / "helper_of_plugin.py").write_text("F = 2.0\n")
    assert run() == 0
    assert all(torch.equal(value, torch.full((4,), 2.0)) for value in load_file(tmp_path / "out.safetensors").values())
