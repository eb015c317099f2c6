"""The demonstration wins on real data: half-blind parents, a merge that sees all ten digits; every run alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

DEMO = Path(__file__).resolve().parents[2] / "examples" / "digits" / "demo.py"


def demonstrate(folder: Path) -> dict[str, float]:
    found = subprocess.run([sys.executable, DEMO, folder], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lines = [line.rsplit(maxsplit=1) for line in found.stdout.splitlines()[1:6]]
    return {title.strip(): float(value) for title, value in lines}


@pytest.mark.slow
def test_the_merge_wins_and_repeats(tmp_path: Path) -> None:
    base, low, high, half, better = demonstrate(tmp_path / "first").values()
    assert 0.4 < low < 0.6
    assert 0.4 < high < 0.6
    assert half > max(low, high) + 0.2
    assert better > 0.90
    assert better > max(base, half)
    demonstrate(tmp_path / "second")
    for name in ("low", "high", "half", "better"):
        first, second = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("first", "second"))
        assert all(first[key].equal(second[key]) for key in first), name
