"""The executor that needs no compiler: the same bits as the methods, by TorchScript and by Python, for any tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import remelt as rm
from remelt.core.dtype import DType
from remelt.engine import torch_executor
from remelt.engine.known import add_part
from remelt.engine.language import Kernel, Number, Operation, Partial, Scalar, Source, Target
from remelt.engine.scratch import Scratch
from remelt.engine.torch_executor import TorchExecutor, torch_executors
from remelt.engine.torch_program import Program, interpreted, scripted
from remelt.methods.selection import UPPER_BINS, upper_histogram, window_histogram

COMPILED = [scripted, interpreted]
SPECIAL = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-45, 3.4e38, 1.0, -2.5, 0.1])


def load(place: int, dtype: DType = DType.F32) -> Operation:
    return Operation("load", (), "single", dtype=dtype, place=place)


def kernel_of(*operations: Operation, constants: tuple[float, ...] = (), partials: tuple[Partial, ...] = ()) -> Kernel:
    """A kernel of float32 whose last operation is its target."""
    loads = [operation for operation in operations if operation.name == "load"]
    assert all(one.dtype is not None for one in loads)
    return Kernel(
        "single",
        operations,
        tuple(Scalar("constant", constant=constant) for constant in constants),
        tuple(Source(place, one.dtype, held=False) for place, one in enumerate(loads) if one.dtype is not None),
        () if partials else (Target(len(operations) - 1, DType.F32, output=0),),
        partials,
    )


def drawn(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator)
    special = SPECIAL[torch.randint(len(SPECIAL), (size,), generator=generator)]
    return torch.where(torch.rand(size, generator=generator) < 0.3, special, values)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


def made(kernel: Kernel, compiled: Callable[[str], Any], *sources: torch.Tensor) -> torch.Tensor:
    executor = TorchExecutor(Program(kernel), compiled(Program(kernel).source))
    numbers = [scalar.constant for scalar in kernel.scalars]
    (found,), _, _ = executor.run(sources, numbers, sources[0].numel(), Scratch(), looks=False)
    return found


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("size", [1, 64, 131, 70_001])
@pytest.mark.parametrize("first", [0, 0.0, -0.0, 2.5])
@pytest.mark.parametrize("second", [1, 0.0, -0.0, -1.5])
def test_a_choice_keeps_every_bit_of_what_is_chosen(
    size: int, first: float, second: float, compiled: Callable[[str], Any]
) -> None:
    a, b = drawn(size, 1), drawn(size, 2)
    operands = [value if type(value) is int else Number(place) for place, value in enumerate((first, second))]
    kernel = kernel_of(
        load(0),
        load(1),
        Operation("lt", (0, 1), "single", truth=True),
        Operation("select", (2, *operands), "single"),
        constants=(float(first), float(second)),
    )
    due = torch.where(
        a < b,
        a if type(first) is int else torch.tensor(first),
        b if type(second) is int else torch.tensor(second),
    )
    assert torch.equal(bits(made(kernel, compiled, a, b)), bits(due))


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("name", ["logical_and", "logical_or", "logical_xor", "logical_not"])
def test_logic_of_truths_is_that_of_torch(name: str, compiled: Callable[[str], Any]) -> None:
    a, b = drawn(300, 3), drawn(300, 4)
    truths = [Operation("gt", (0, Number(0)), "single", truth=True), Operation("le", (0, 1), "single", truth=True)]
    operands = (2,) if name == "logical_not" else (2, 3)
    kernel = kernel_of(
        load(0),
        load(1),
        *truths,
        Operation(name, operands, "single", truth=True),
        Operation("convert", (4,), "single"),
        constants=(0.1,),
    )
    due = getattr(torch, name)(*[a > 0.1, a <= b][: len(operands)]).float()
    assert torch.equal(made(kernel, compiled, a, b), due)


def sums_of(kernel: Kernel, compiled: Callable[[str], Any], source: torch.Tensor, tile: int) -> list[torch.Tensor]:
    """The sums, run by run of some elements."""
    executor = TorchExecutor(Program(kernel), compiled(Program(kernel).source))
    numbers = [scalar.constant for scalar in kernel.scalars]
    found: dict[str, Any] = {}
    for part in source.split(tile) if source.numel() else [source]:
        _, sums, _ = executor.run([part], numbers, part.numel(), Scratch(), looks=False)
        for place, one in enumerate(sums):
            add_part(found, str(place), one)
    return [torch.as_tensor(value, dtype=torch.float64) for value in found.values()]


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("size", [0, 1, 70_001, 200_000])
def test_sums_and_histograms_are_the_same_for_any_tile(size: int, compiled: Callable[[str], Any]) -> None:
    source = torch.randn(size, generator=torch.Generator().manual_seed(5))
    source[: len(SPECIAL)] = SPECIAL[:size]
    finite = source.nan_to_num(0.0, 0.0, 0.0).clamp(-1e3, 1e3)
    row = 0x3F8000
    kernel = kernel_of(
        load(0),
        Operation("convert", (0,), "double"),
        Operation("mul", (1, 1), "double"),
        Operation("add", (2, Number(1)), "double"),
        constants=(float(row), 1.5),
        partials=(
            Partial(0, 0, "coarse", bins=UPPER_BINS),
            Partial(2, 0, "squares"),
            Partial(0, 0, "fine", bins=2**16, begin=Number(0)),
            Partial(3, 0, "more"),
        ),
    )
    coarse, squares, fine, more = sums_of(kernel, compiled, finite, 2**16)
    for tile in (2**17, 2**20):
        again = sums_of(kernel, compiled, finite, tile)
        assert all(map(torch.equal, again, (coarse, squares, fine, more)))
    assert torch.equal(coarse, upper_histogram(finite))
    assert torch.equal(fine, window_histogram(finite, row, 2**16))
    assert float(squares) == pytest.approx(float(finite.double().square().sum()), rel=1e-12)
    assert float(more) == pytest.approx(float((finite.double().square() + 1.5).sum()), rel=1e-12)
    counted = sums_of(kernel, compiled, source, 2**16)
    assert torch.equal(counted[0], upper_histogram(source))


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16])
def test_a_source_that_is_not_finite_is_suspected_wherever_the_value_is(
    dtype: DType, compiled: Callable[[str], Any]
) -> None:
    kernel = kernel_of(load(0, dtype), load(1, dtype), Operation("minimum", (0, 1), "single"))
    executor = TorchExecutor(Program(kernel), compiled(Program(kernel).source))
    stored = torch.float32 if dtype is DType.F32 else torch.float16
    good = torch.ones(140_001, dtype=stored)
    for place in (0, 65_536, 140_000):
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = good.clone()
            bad[place] = value
            assert executor.run([good, bad], [], len(good), Scratch(), looks=True)[2] == [1]
            assert executor.run([good, bad], [], len(good), Scratch(), looks=False)[2] == []
    assert executor.run([good, good], [], len(good), Scratch(), looks=True)[2] == []


def test_large_numbers_whose_sum_overflows_are_no_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", "torch")
    large, small = rm.model({"w": torch.full((100,), 3e38)}), rm.model({"w": torch.zeros(100)})
    merged = rm.merge(rm.slerp(small, rm.weighted_sum(large, small, alpha=0.9), alpha=0.5))
    assert bool(merged["w"].isfinite().all())


RECIPES: dict[str, Callable[..., Any]] = {
    "slerp": lambda a, b, c: rm.slerp(a, b, alpha=0.3),
    "ties": lambda a, b, c: a + rm.ties_sum(b - a, c - a),
    "trimmed": lambda a, b, c: a + rm.ties_sum(b - a, c - a, k=0.4),
    "difference": lambda a, b, c: rm.add_difference(a, b - c, alpha=0.7),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_tile_no_thread_and_no_compiler_changes_a_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", "torch")
    generator = torch.Generator().manual_seed(7)
    models = [
        rm.model({key: torch.randn(size, generator=generator).to(dtype) for key, size in (("v", 300_001), ("w", 37))})
        for _ in "abc"
    ]
    recipe = RECIPES[name](*models)
    due = rm.merge(recipe, threads=1)
    for tile, block, threads in ((2**16, 2**14, 1), (2**17, 2**15, 2), (2**20, 2**16, 3)):
        for size in ("_TILE", "_COUNTED_TILE"):
            monkeypatch.setattr(torch_executor, size, tile)
        monkeypatch.setattr(torch_executor, "_BLOCK", block)
        found = rm.merge(recipe, threads=threads)
        assert all(torch.equal(found[key], due[key]) for key in due)
    monkeypatch.setattr(torch_executor, "scripted", interpreted)
    found = rm.merge(recipe, threads=2)
    assert all(torch.equal(found[key], due[key]) for key in due)


def test_without_torchscript_python_runs_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: str) -> Any:
        raise RuntimeError("no TorchScript")

    kernel = kernel_of(load(0), load(1), Operation("sub", (0, 1), "single"))
    assert len(list(torch_executors(kernel))) == 2
    monkeypatch.setattr(torch_executor, "scripted", missing)
    (executor,) = torch_executors(kernel)
    (found,), _, _ = executor.run([torch.ones(3), torch.zeros(3)], [], 3, Scratch(), looks=False)
    assert found.tolist() == [1.0, 1.0, 1.0]
