"""What a merge may cost, by counts that no busy machine changes: bytes, calls of the system, instructions, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import remelt as rm
from remelt.api.merging import Merged, prepare_merges, run_prepared
from remelt.api.options import MergeOptions
from remelt.api.recipes import load_recipe
from remelt.engine import native, scratch, torch_executor
from remelt.engine.sweeps import Executor, Kernels
from remelt.engine.tally import Tally, together

EXECUTORS = ("native", "torch") if native.available() else ("torch",)
PIECE = 2**18
"""Bytes of a write."""
MANY = 24
"""Models of the recipe with the most of them."""

needs_counts = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system counts no calls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(MANY):
        drawn = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(512, 512, generator=drawn).half() for i in range(20)}
        tensors |= {"large": torch.randn(2**23 if seed < 4 else 2**10, generator=drawn).half()}
        if seed >= 4:
            tensors["large"] = tensors["large"].repeat(2**13)
        order = sorted(tensors, reverse=bool(seed % 2))
        save_file({key: tensors[key] for key in order}, folder / f"m{seed}.safetensors")
    return folder


def models(folder: Path, count: int) -> list[Any]:
    return [rm.model(folder / f"m{seed}.safetensors") for seed in range(count)]


def chain(folder: Path, calls: int) -> Any:
    a, *others = models(folder, 4)
    for place in range(calls):
        a = rm.weighted_sum(a, others[place % 3], alpha=0.1 + 0.8 * place / calls)
    return a


RECIPES: dict[str, Callable[[Path], Any]] = {
    "weighted_sum": lambda folder: rm.weighted_sum(*models(folder, 2), alpha=0.3),
    "add_difference": lambda folder: rm.add_difference(
        models(folder, 3)[0], models(folder, 3)[1] - models(folder, 3)[2], alpha=0.7
    ),
    "n_average": lambda folder: rm.n_average(*models(folder, MANY)),
    "chain": lambda folder: chain(folder, 20),
    "slerp": lambda folder: rm.slerp(*models(folder, 2), alpha=0.3),
    "ties": lambda folder: (
        models(folder, 1)[0] + rm.ties_sum(*(model - models(folder, 1)[0] for model in models(folder, 4)[1:]))
    ),
    "ties trimmed": lambda folder: (
        models(folder, 1)[0] + rm.ties_sum(*(model - models(folder, 1)[0] for model in models(folder, 4)[1:]), k=0.2)
    ),
}
PASSES = {"slerp": 2, "ties trimmed": 2}
"""How often a recipe reads its inputs, where that is not once."""
SAMPLED = {"ties trimmed": 4 * 2 * (20 * 2**18 + 2**17)}
"""Bytes that are read beside: all of small tensors, and samples of large ones."""


def counted(recipe: Any, output: Path, **options: Any) -> tuple[Merged, Tally]:
    chosen = MergeOptions(overwrite=True, threads=2, **options)
    with prepare_merges([load_recipe(recipe)], [output], chosen) as prepared:
        merged = next(event for event in run_prepared(prepared, chosen) if isinstance(event, Merged))
    return merged, together(merged.tallies)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_each_pass_reads_each_byte_once_and_each_byte_is_written_once(
    name: str, executor: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    merged, tally = counted(RECIPES[name](folder), tmp_path / "out.safetensors")
    plan = merged.plans[0]
    needed = sum(given.size for given in plan.inputs) * PASSES.get(name, 1)
    assert tally.read == needed + SAMPLED.get(name, 0)
    assert plan.bytes_read <= tally.read <= 1.01 * plan.bytes_read
    assert tally.written == sum(info.nbytes for output in plan.outputs for info in output.tensors.values())


@needs_counts
@pytest.mark.parametrize("name", ["weighted_sum", "n_average", "chain", "slerp", "ties trimmed"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_calls_of_the_system_are_as_many_as_the_bytes_need(
    name: str, executor: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    recipe, output = RECIPES[name](folder), tmp_path / "out.safetensors"
    rm.merge(recipe, output=output, threads=2)
    before = system_counts()
    merged, tally = counted(recipe, output)
    found = {name: count - before[name] for name, count in system_counts().items()}
    tensors = len(merged.plans[0].outputs[0].tensors)
    slices = tally.written / 2**23
    assert tally.written <= found["wchar"] <= tally.written + 2**20
    assert found["syscw"] <= tally.written / PIECE + 2 * (tensors + slices) + 60
    assert found["syscr"] <= 40 * len(merged.plans[0].inputs)  # headers: what is mapped is read by no call


@needs_counts
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_no_more_is_read_than_each_pass_needs_in_whatever_order_the_inputs_are(
    name: str, executor: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMELT_READ", "read")
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    recipe = RECIPES[name](folder)  # the keys of every other model are in the opposite order
    rm.merge(recipe, output=tmp_path / "out.safetensors")
    before = system_counts()
    merged, tally = counted(recipe, tmp_path / "out.safetensors")
    found = system_counts()["rchar"] - before["rchar"]
    assert tally.read <= 1.01 * merged.plans[0].bytes_read
    assert tally.read <= found <= 1.05 * tally.read


def system_counts() -> dict[str, int]:
    """Calls and bytes of this process, by the system's count."""
    return {
        name: int(count)
        for name, count in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    }


LENGTHS = {"weighted_sum": 3, "add_difference": 6, "n_average": 2 * MANY, "chain": 24, "slerp": 6, "ties": 31}
"""Operations of the kernel that writes the result: what is computed twice is computed once, and nothing is idle."""


@pytest.mark.parametrize("name", LENGTHS)
def test_programs_are_as_short_as_the_recipe(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Executor] = []
    real = Kernels._make

    def remember(kernels: Kernels, *given: Any) -> Executor | None:
        found = real(kernels, *given)
        assert found is not None
        made.append(found)
        return found

    monkeypatch.setattr(Kernels, "_make", remember)
    counted(RECIPES[name](folder), tmp_path / "out.safetensors")
    writing = [
        executor.kernel for executor in made if any(target.output is not None for target in executor.kernel.targets)
    ]
    assert len(writing) <= 2, "one kernel serves all small tensors, and one all large ones"
    assert max(len(kernel.operations) for kernel in writing) <= LENGTHS[name]


MEASURED = """
import json, os, sys, threading, time
os.environ["REMELT_EXECUTOR"] = sys.argv[1]
import pytest, torch
from safetensors.torch import save_file  # what only the test needs is no part of what is measured
def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))
idle = anonymous()
import remelt as rm
sys.path.insert(0, sys.argv[2])
from test_counters import RECIPES
from pathlib import Path
recipe, output, options = RECIPES[sys.argv[3]](Path(sys.argv[4])), sys.argv[5], json.loads(sys.argv[6])
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch, daemon=True)
thread.start()
rm.merge(recipe, output=output, threads=2, **options)
done.set()
thread.join()
print(json.dumps(max(peak[0], anonymous()) - idle))
"""


def peak_memory(executor: str, name: str, folder: Path, output: Path, **options: Any) -> int:
    """Anonymous memory at the peak of a merge, above the interpreter with torch; in a process of its own."""
    found = subprocess.run(
        [
            *(sys.executable, "-c", MEASURED, executor, str(Path(__file__).parent)),
            *(name, str(folder), str(output), json.dumps(options)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


MOST = {"native": 32 * 2**20, "torch": 64 * 2**20}
"""Bytes that recipes of element methods may take, what importing remelt takes among them."""


@pytest.mark.parametrize("name", ["weighted_sum", "chain", "slerp", "ties trimmed"])
def test_memory_for_tiles_is_taken_once(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are made for the first tiles, and none for those after them, however many there are."""
    monkeypatch.setenv("REMELT_EXECUTOR", "torch")
    for size in ("_TILE", "_COUNTED_TILE", "_DIRECT_TILE"):
        monkeypatch.setattr(torch_executor, size, 2**16)
    monkeypatch.setattr(torch_executor.DirectExecutor, "tile", 2**16)
    made: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty(self, size: int, **more: Any) -> torch.Tensor:
            made.append(size)
            return torch.empty(size, **more)

    monkeypatch.setattr(scratch, "torch", Watched())
    _, tally = counted(RECIPES[name](folder), tmp_path / "out.safetensors")
    assert tally.tiles >= 200
    assert len(made) <= 2 * 24, "of two threads"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize("name", ["weighted_sum", "n_average", "chain", "slerp"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_memory_does_not_depend_on_the_models(name: str, executor: str, folder: Path, tmp_path: Path) -> None:
    assert peak_memory(executor, name, folder, tmp_path / "out.safetensors") <= MOST[executor]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize("name", ["slerp", "ties trimmed"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_budget_is_kept_by_reductions(name: str, executor: str, folder: Path, tmp_path: Path) -> None:
    assert peak_memory(executor, name, folder, tmp_path / "out.safetensors", memory="128MiB") <= 128 * 2**20
