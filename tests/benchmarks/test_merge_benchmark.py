"""The benchmark of merges works: with small files it prints its table, and keeps its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "merge.py"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the benchmark copies with cp")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_benchmark_prints_a_line_for_each_row_and_keeps_its_figures(tmp_path: Path) -> None:
    raw, plot = tmp_path / "raw.json", tmp_path / "growth.svg"
    rows = "W,slerp,memory-slerp,plan-models,keys,growth-2,growth-5"
    done = run("--small", "--rows", rows, "--folder", tmp_path / "models", "--json", raw, "--plot", plot, "--markdown")
    assert done.returncode == 0, done.stderr
    heads, rule, *lines = done.stdout.partition("\n\n")[0].splitlines()
    assert heads.startswith("| case | native | torch | against |")
    assert set(rule) <= set("|- ")
    assert len(lines) == len(rows.split(","))
    told = json.loads(raw.read_text())
    assert [row["name"] for row in told["rows"]] == rows.split(",")
    for row, line in zip(told["rows"], lines, strict=True):
        assert line.startswith(f"| {row['title']} |")
        value = row["figures"]["torch"]["value"]  # of keys it is a difference of two times
        assert value > 0 or (row["name"] == "keys" and value is not None), done.stderr
    assert all(run["peak"] > 0 for job in told["rows"][2]["jobs"] for run in job.get("runs", ()))
    assert "Small files" in done.stdout
    assert plot.read_text().startswith("<svg")
    assert list((tmp_path / "models").glob("output*")) == []


def test_a_row_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    done = run("--rows", "W,warp")
    assert done.returncode == 2
    assert "no row is named 'warp'; there are W, W-synced, sdxl" in done.stderr
    assert done.stdout == ""
