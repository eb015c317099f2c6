"""A power cut at any moment leaves the old result or the new one under the final name, whatever of the rest is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_disk import after_power_cut, record

import remelt as rm

CUTS = 200
KEPT = ("", "names", "data")


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    models = tmp_path / "models"
    for seed, name in enumerate("abc"):
        drawn = torch.Generator().manual_seed(seed)
        write_model(models / name, {f"layers.{i}.weight": torch.randn(20, 20, generator=drawn) for i in range(6)})
    monkeypatch.chdir(models)
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recorded(folder: Path, output: str, **options: Any) -> tuple[list[tuple[Any, ...]], dict[str, bytes]]:
    """What an overwriting merge asked of the disk, and what was there before."""
    rm.merge(rm.weighted_sum("a", "b", alpha=0.3), output=folder / output, **options)
    before = files(folder)
    with pytest.MonkeyPatch.context() as patch:
        told = record(folder, patch)
        rm.merge(rm.weighted_sum("a", "c", alpha=0.6), output=folder / output, overwrite=True, threads=1, **options)
    return told.operations, before


def states(operations: list[tuple[Any, ...]], before: dict[str, bytes]) -> Any:
    chance = random.Random(0)
    for cut in range(len(operations) + 1):
        for keep in KEPT:
            yield after_power_cut(operations[:cut], before, None, keep)
    for _ in range(CUTS):
        yield after_power_cut(operations[: chance.randrange(len(operations) + 1)], before, chance)


def test_a_file_is_the_old_one_or_the_new_one_after_any_cut(folder: Path) -> None:
    operations, before = recorded(folder, "mix.safetensors")
    old, new = before["mix.safetensors"], (folder / "mix.safetensors").read_bytes()
    assert old != new
    seen = {state["mix.safetensors"] for state in states(operations, before)}
    assert seen == {old, new}
    assert after_power_cut(operations, before, None)["mix.safetensors"] == new


def test_without_its_flush_the_model_of_the_disk_finds_a_spoiled_file(folder: Path) -> None:
    operations, before = recorded(folder, "mix.safetensors")
    careless = [operation for operation in operations if operation[0] != "flush"]
    seen = {state["mix.safetensors"] for state in states(careless, before)}
    assert seen - {before["mix.safetensors"], (folder / "mix.safetensors").read_bytes()}


def test_an_index_never_mixes_old_and_new_shards(folder: Path) -> None:
    operations, before = recorded(folder, "shards", max_shard_size="4KB")
    after = files(folder)
    shards = [name for name in after if name.endswith(".safetensors")]
    assert len(shards) > 2
    index = "shards/model.safetensors.index.json"
    found = set()
    for state in states(operations, before):
        if index in state:
            kinds = {"old" if state[name] == before[name] else "new" for name in shards if name in state}
            assert all(state[name] in (before[name], after[name]) for name in shards if name in state)
            assert len(kinds) == 1
            found |= kinds
    assert found == {"old", "new"}


def test_whatever_is_left_the_next_merge_makes_the_same_bytes(folder: Path) -> None:
    operations, before = recorded(folder, "mix.safetensors")
    new = (folder / "mix.safetensors").read_bytes()
    chance = random.Random(1)
    kept = 0
    for _ in range(60):
        cut = chance.randrange(len(operations) // 4, len(operations) + 1)
        state = after_power_cut(operations[:cut], before, chance)
        for path in folder.iterdir():
            path.unlink()
        for name, content in state.items():
            (folder / name).write_bytes(content)
        kept += "mix.safetensors.partial" in state and "mix.safetensors.journal" in state
        rm.merge(rm.weighted_sum("a", "c", alpha=0.6), output=folder / "mix.safetensors", overwrite=True)
        assert files(folder) == {"mix.safetensors": new}
    assert kept > 5
