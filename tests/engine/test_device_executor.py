"""The executor of other devices, with the processor in their place: the same results, and tasks that have no room."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import remelt as rm
from remelt.core.dtype import DType
from remelt.engine import device_executor
from remelt.engine.device_executor import DeviceExecutor
from remelt.engine.language import Kernel, Operation, Source, Target
from remelt.engine.tiles import TaskRun

CPU = torch.device("cpu")
SIZE = 2**18 + 77


def model(seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(SIZE, generator=drawn).half(), "v": torch.randn(7, 3, generator=drawn)}


def recipes() -> dict[str, rm.Recipe]:
    a, b, c = (rm.model(model(seed)) for seed in range(3))
    return {
        "element": rm.weighted_sum(a, b, alpha=0.3) + 0.5 * (b - c),
        "reduced": rm.slerp(a, b, alpha=0.3),
        "ranked": a + rm.ties_sum(b - a, c - a, k=0.3),
        "masked": rm.weighted_sum(a, rm.slerp(b, c, alpha=0.5), alpha=0.25),
    }


@pytest.mark.parametrize("name", ["element", "reduced", "ranked", "masked"])
def test_tiles_that_travel_give_what_those_in_memory_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes()[name]
    monkeypatch.setenv("REMELT_EXECUTOR", "torch")
    expected = rm.merge(recipe)
    monkeypatch.setenv("REMELT_EXECUTOR", "device")
    used = []
    tile = DeviceExecutor.tile
    monkeypatch.setattr(DeviceExecutor, "tile", lambda *given: (used.append(given), tile(*given))[1])
    for size in (2**16, 2**17, 2**22):
        monkeypatch.setattr(device_executor, "DEVICE_TILE", size)
        found = rm.merge(recipe, threads=2)
        for key, value in expected.items():
            assert torch.equal(found[key].view(torch.uint8), value.view(torch.uint8)), (key, size)
    assert used


def test_a_step_that_the_device_has_no_room_for_is_done_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    run = TaskRun.run

    def has_room_in_memory(task: TaskRun, *given: Any, **named: Any) -> None:
        tried.append(f"{task.task.key} by {task.place.kernels.executor}")
        if task.place.kernels.executor == "device":
            raise torch.OutOfMemoryError("no room")
        run(task, *given, **named)

    expected = rm.merge(recipes()["element"])
    monkeypatch.setattr(TaskRun, "run", has_room_in_memory)
    monkeypatch.setenv("REMELT_EXECUTOR", "device")
    found = rm.merge(recipes()["element"], threads=1)
    assert tried == ["w by device", "w by torch", "v by device", "v by torch"]
    for key, value in expected.items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize(
    ("stored", "kind", "suits"),
    [
        (DType.F16, "single", True),
        (DType.F8_E5M2, "single", False),
        (DType.F64, "single", False),
        (DType.F16, "double", False),
    ],
)
def test_what_apples_devices_lack_is_left_to_the_processor(stored: DType, kind: str, suits: bool) -> None:
    load = Operation("load", (), kind, dtype=stored)  # type: ignore[arg-type]
    kernel = Kernel("single", (load,), (), (Source(0, stored, held=False),), (Target(0, stored, output=0),), ())
    assert DeviceExecutor.suits(kernel, torch.device("mps")) is suits
    assert DeviceExecutor.suits(kernel, CPU)
