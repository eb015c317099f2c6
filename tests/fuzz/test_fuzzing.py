"""The readers against a fuzzer: its corpus again, and a short run of its own where it is installed."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
SECONDS = 20
NAMES = ("header", "archive", "recipe", "value")


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_finds_nothing(name: str) -> None:
    spec = importlib.util.spec_from_file_location("fuzz_targets", HERE / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    targets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(targets)
    found = sorted((CORPUS / name).iterdir())
    assert found
    for path in found:
        targets.TARGETS[name](path.read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this system")
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    limits = [f"-max_total_time={SECONDS}", "-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"]
    (tmp_path / "new").mkdir()
    command = [sys.executable, HERE / "run.py", name, *limits, tmp_path / "new", CORPUS / name]
    # by a shell that lives on: the most memory that is reckoned to a process is at first that of who started it
    said = f"{shlex.join(map(str, command))}; exit $?"
    found = subprocess.run(["sh", "-c", said], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    assert "Done " in found.stderr
