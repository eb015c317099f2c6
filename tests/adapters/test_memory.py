"""What adapters hold in memory is in the plan, and is what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import remelt as rm
from remelt.adapters.checkpoint import ChangesCheckpoint
from remelt.errors import BudgetError
from remelt.planning.cost import COPIED
from remelt.recipe.adapter import adapter

SIDE, RANK, COUNT = 1536, 32, 6
MIB = 2**20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = {f"mid.{place}.weight": torch.randn(SIDE, SIDE) for place in range(COUNT)}
    save_file(base, "base.safetensors")
    for name in ("a", "b", "dora"):
        parts: dict[str, Tensor] = {}
        for place in range(COUNT):
            parts[f"mid.{place}.lora_up.weight"] = torch.randn(SIDE, RANK)
            parts[f"mid.{place}.lora_down.weight"] = torch.randn(RANK, SIDE)
            if name == "dora":
                parts[f"mid.{place}.dora_scale"] = torch.rand(SIDE, 1) + 0.5
        save_file(parts, f"{name}.safetensors")


def recipe(names: str) -> Any:
    found: Any = rm.model("base")
    for name in names.split():
        found = found + 0.5 * adapter(name)
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_each_thread_and_factors_are_in_the_plan(threads: int) -> None:
    peaks = {
        names: rm.plan(recipe(names), "out.safetensors", threads=threads, memory="1GiB").peak_memory
        for names in ("", "a", "a b", "dora")
    }
    factors = (4 + 2) * 2 * SIDE * RANK * 4  # of four changes, in float32, and of one that is opened
    rows = 2 * 4 * (COPIED + 2 * SIDE)
    for more, known in (
        (peaks["a"] - peaks[""], factors + threads * (rows + ChangesCheckpoint.scratch)),
        (peaks["a b"] - peaks["a"], factors + threads * rows),  # a thread computes one after another
    ):
        assert 0 <= more - known <= threads * 2 * MIB  # for tiles, which have some registers more
    assert peaks["dora"] - peaks["a"] >= threads * 2 * rows
    with pytest.raises(BudgetError, match="the step with the highest peak needs"):
        rm.plan(recipe("dora"), "out.safetensors", threads=1, memory=f"{factors}B")


@pytest.mark.parametrize("names", ["a", "a b", "dora"])
def test_no_more_is_held_than_the_plan_says(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows that are handed over, and of the factors that stay open."""
    most, read = 0, ChangesCheckpoint.read

    def watched(self: ChangesCheckpoint, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        nonlocal most
        data = read(self, key, start, stop)
        most = max(most, len(data))
        assert len(data) <= self.beside(key, COPIED)
        opened = [change for change in self._opened.values() if change.factors() is not None]
        held = sum(one.numel() * 4 for change in opened for one in change.factors() or ())
        assert held <= self.held
        return data

    monkeypatch.setattr(ChangesCheckpoint, "read", watched)
    rm.merge(recipe(names), "out.safetensors", threads=2)
    assert 0 < most <= 4 * COPIED
