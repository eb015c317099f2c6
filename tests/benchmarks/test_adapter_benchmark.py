"""The benchmark of adapters works: with small files it prints its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "adapters.py"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="memory is measured by /proc")


@pytest.mark.slow
def test_the_benchmark_prints_a_line_for_each_case(tmp_path: Path) -> None:
    words = ("--small", "--repeat", "1", "--folder", str(tmp_path), "--markdown")
    done = subprocess.run([sys.executable, str(BENCHMARK), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heads, rule, *lines = done.stdout.partition("\n\n")[0].splitlines()
    assert heads.startswith("| SDXL, fp16, rank 4 | time | over weighted_sum |")
    assert set(rule) <= set("|- ")
    assert [line.split(" | ")[0] for line in lines] == ["| weighted_sum", "| one LoRA"]
    assert all(float(line.split(" | ")[1].removesuffix(" s")) > 0 for line in lines)
    assert lines[0].split(" | ")[2] == "1.00"
    assert "at most 1.5 times as long, and 64 MiB more" in done.stdout
    assert list(tmp_path.glob("output*")) == []
