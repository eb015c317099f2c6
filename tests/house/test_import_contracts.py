"""The import contracts hold, and they bite: a planted violation fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the package with its contracts."""
    shutil.copytree(ROOT / "src" / "remelt", tmp_path / "remelt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(project: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(project)!r}); sys.argv = ['lint-imports', '--no-cache']; {COMMAND}"
    return subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False)


def plant(project: Path, file: str, line: str) -> None:
    path = project / "remelt" / file
    path.write_text(f"{path.read_text()}\n\ndef planted() -> None:\n    {line}\n")


def test_the_contracts_hold(project: Path) -> None:
    found = lint(project)
    assert found.returncode == 0, found.stdout
    assert "0 broken" in found.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("core/dtype.py", "import remelt.formats.layout", "A floor imports only what stands below it"),
        ("formats/layout.py", "from remelt.archs import facts", "A floor imports only what stands below it"),
        ("check/keys.py", "import remelt.engine.run", "A floor imports only what stands below it"),
        ("recipe/walk.py", "import torch", "Torch stays out of the floors that open, read and plan"),
        ("engine/run.py", "import remelt", "No file inside goes round by the front door"),
    ],
)
def test_a_planted_violation_fails(project: Path, file: str, line: str, contract: str) -> None:
    plant(project, file, line)
    found = lint(project)
    assert found.returncode == 1
    assert f"{contract} BROKEN" in " ".join(found.stdout.split()), found.stdout


def test_a_floor_that_no_contract_names_fails(project: Path) -> None:
    (project / "remelt" / "attic").mkdir()
    (project / "remelt" / "attic" / "__init__.py").write_text('"""A floor without a place."""\n')
    found = lint(project)
    assert found.returncode != 0
    assert "attic" in found.stdout + found.stderr
