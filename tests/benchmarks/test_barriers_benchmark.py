"""Alignment makes merging better on real data: the benchmark of barriers, on networks trained for a short while."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "barriers.py"


def rows(*words: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """The lines of the table by networks and how they are merged: the barriers, then the accuracies."""
    done = subprocess.run([sys.executable, str(BENCHMARK), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:] if line.startswith("|")]
    return {(kind, way): tuple(float(one.removesuffix(" %")) for one in numbers) for kind, way, *numbers in lines}


def test_two_perceptrons_merge_without_a_barrier_once_they_are_aligned() -> None:
    found = rows("--only", "perceptron", "--pairs", "1", "--epochs", "8")
    pair = "perceptron, 3 x 512"
    assert found[pair, "as they are"][1] > 0.5
    assert found[pair, "weight matching"][1] < 0.02
    assert found[pair, "weight matching"][2] >= 97


@pytest.mark.slow
def test_five_perceptrons_merge_once_they_are_aligned() -> None:
    found = rows("--only", "perceptrons")
    five = "5 perceptrons, 3 x 512"
    plain, aligned, refined = (
        found[five, way] for way in ("as they are", "each matched to the first", "each matched to the first, MergeMany")
    )
    assert plain[2] < 60
    assert refined[2] >= 96.5
    assert refined[1] < aligned[1] < plain[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "title", "most"),
    [
        ("residual", "residual, LayerNorm, width 128", 0.75),
        ("transformer", "transformer, 2 layers, width 256", 0.60),
    ],
)
def test_residual_networks_and_transformers_have_lower_barriers(kind: str, title: str, most: float) -> None:
    found = rows("--only", kind, "--pairs", "1")
    assert found[title, "as they are"][1] > 0.9
    assert found[title, "weight matching"][1] <= most


@pytest.mark.slow
def test_repair_mends_what_batch_norms_lose() -> None:
    found = rows("--only", "batchnorm", "--pairs", "1", "--epochs", "8")
    title = "residual, BatchNorm, width 64"
    assert found[title, "weight matching, REPAIR"][2] > found[title, "weight matching"][2] + 10
