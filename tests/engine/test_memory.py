"""What executors hold is what the plan says they hold, whatever the sizes, the number of results, or the budget."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import remelt as rm
from remelt.api.merging import prepare_merges, run_prepared
from remelt.api.options import MergeOptions
from remelt.api.recipes import load_recipe
from remelt.engine.scratch import Scratch
from remelt.planning.cost import DEVICE_TILE
from remelt.planning.plan import Plan

MIB = 2**20


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The most bytes of scratch that each thread held."""
    monkeypatch.setenv("REMELT_EXECUTOR", "torch")
    most: dict[int, int] = {}
    take = Scratch.take

    def watched(scratch: Scratch, size: int, dtype: torch.dtype) -> torch.Tensor:
        found = take(scratch, size, dtype)
        thread = threading.get_ident()
        most[thread] = max(most.get(thread, 0), scratch.held)
        return found

    monkeypatch.setattr(Scratch, "take", watched)
    return most


def run(recipes: list[Any], outputs: list[Path], **options: Any) -> Plan:
    chosen = MergeOptions(overwrite=True, **options)
    with prepare_merges([load_recipe(recipe) for recipe in recipes], outputs, chosen) as prepared:
        for _ in run_prepared(prepared, chosen):
            pass
        (group,) = prepared.groups
        return group.plan


@pytest.fixture
def write(tmp_path: Path, write_model: Callable[..., Path]) -> Callable[[str, list[int]], rm.model]:
    def made(name: str, sizes: list[int]) -> Any:
        drawn = torch.Generator().manual_seed(len(name))
        tensors = {f"w{place:03d}": torch.randn(size, generator=drawn) for place, size in enumerate(sizes)}
        return rm.model(write_model(tmp_path / name, tensors))

    return made


@pytest.mark.parametrize("memory", ["8MiB", "64MiB"])
def test_growing_tensors_leave_nothing_behind(memory: str, held: dict[int, int], write: Any, tmp_path: Path) -> None:
    sizes = [16384 * (place + 1) for place in range(40)]
    recipe = rm.weighted_sum(write("a", sizes), write("bb", sizes), alpha=0.3)
    plan = run([recipe], [tmp_path / "out.safetensors"], threads=2, memory=memory)
    assert sum(held.values()) <= plan.peak_memory <= plan.memory_budget


def test_a_small_tensor_after_a_large_one_does_not_keep_the_large_ones_memory(
    held: dict[int, int], write: Any, tmp_path: Path
) -> None:
    sizes = [2**20, *[1000] * 200, 2**20, *[1000] * 200]
    recipe = rm.weighted_sum(write("a", sizes), write("bb", sizes), alpha=0.3)
    largest = max(task.cost.memory for task in run([recipe], [tmp_path / "out.safetensors"], threads=1).tasks)
    held.clear()
    plan = run([recipe], [tmp_path / "out.safetensors"], threads=4, memory=f"{largest + MIB}B")
    assert max(held.values()) <= largest
    assert plan.peak_memory <= largest + MIB


@pytest.mark.parametrize("results", [1, 3, 12])
def test_many_results_share_the_budget(results: int, held: dict[int, int], write: Any, tmp_path: Path) -> None:
    a, b = write("a", [2**21]), write("bb", [2**21])
    recipes = [rm.weighted_sum(a, b, alpha=place / 20 + 0.01) for place in range(results)]
    outputs = [tmp_path / f"out{place}.safetensors" for place in range(results)]
    plan = run(recipes, outputs, threads=1, memory="16MiB")
    assert max(held.values()) <= plan.peak_memory <= 16 * MIB


def test_trimmed_ties_holds_what_is_planned(held: dict[int, int], write: Any, tmp_path: Path) -> None:
    a, b, c = (write(name, [2**21]) for name in ("a", "bb", "ccc"))
    plan = run([a + rm.ties_sum(b - a, c - a, k=0.2)], [tmp_path / "out.safetensors"], threads=1, memory="64MiB")
    assert max(held.values()) <= plan.peak_memory <= 64 * MIB


def test_memory_that_a_device_copies_from_is_in_the_plan(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write("a", [2**23]), write("bb", [2**23])
    recipe = load_recipe(rm.weighted_sum(a, b, alpha=0.3))
    monkeypatch.setattr("remelt.api.prepare.refuse_device", lambda _: None)
    peaks = {}
    for device in ("cpu", "cuda"):
        with prepare_merges([recipe], [None], MergeOptions(threads=1, device=device, memory="1GiB")) as prepared:
            peaks[device] = prepared.groups[0].plan.peak_memory
    assert peaks["cuda"] - peaks["cpu"] == 3 * 4 * DEVICE_TILE
