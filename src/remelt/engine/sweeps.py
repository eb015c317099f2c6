"""Sweeps that were traced: a kernel is made once for all keys of a kind, tried on a sample, and run by an executor."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from remelt.check.program import Apply, Bundle, Load, Register
from remelt.engine.finite import is_finite
from remelt.engine.language import Kernel
from remelt.engine.sample import Sample
from remelt.engine.tensors import FROM_TORCH
from remelt.engine.torch_executor import PADDING, DirectExecutor, TorchExecutor, torch_executor
from remelt.engine.tracing import trace
from remelt.planning.passes import Sweep

if TYPE_CHECKING:
    from remelt.engine.native_executor import NativeExecutor
    from remelt.engine.tiles import TaskRun


class Executor(Protocol):
    """What runs a kernel on some elements of a task."""

    kernel: Kernel

    def step(self, run: TaskRun) -> int:
        """Elements that one call takes."""

    def tile(self, run: TaskRun, numbers: Any, begin: int, end: int) -> None:
        """Compute some elements: write what goes to results, keep what stays whole, tell what is not finite."""


class Kernels:
    """The kernels of a merge: traced at the first key of each kind, and found again for the others."""

    def __init__(self, *, use_native: bool = False) -> None:
        self.use_native = use_native
        self._found: dict[int, tuple[Sweep, Executor | None]] = {}
        """By the identity of a sweep, which all keys of one kind share: of one program and the same element types."""
        self._lock = threading.Lock()

    def of(self, run: TaskRun, sweep: Sweep) -> Executor | None:
        """What runs a sweep of a task; None where its methods are called tile by tile."""
        known = self._found.get(id(sweep))
        if known is None:
            with self._lock:
                known = self._found.setdefault(id(sweep), (sweep, self._make(run, sweep)))
        return known[1]

    def _make(self, run: TaskRun, sweep: Sweep) -> Executor | None:
        if run.task.copy or run.place.device.type != "cpu" or (sweep.reductions and not self.use_native):
            return None
        instructions = run.program.instructions
        sources = {
            register: run.stored_type(found)
            for register in sweep.order
            if isinstance(found := instructions[register], Load)
        }
        targets = [run.task.outputs[position][2].dtype for position in sweep.outputs]
        kernel = trace(run.program, sweep, sources, targets, run.whole, FROM_TORCH[run.place.compute])
        if kernel is None or (numbers := run.numbers_of(kernel)) is None:
            return None
        sample = Sample(kernel, run, sweep)
        by_torch = torch_executor(kernel)
        if not sample.agrees(by_torch.run(sample.sources, numbers, PADDING)):
            return None
        if self.use_native and (made := _native(kernel)) is not None and sample.agrees(*made.sample(sample, numbers)):
            return made
        return None if sweep.reductions else TorchTiles(by_torch)


def _native(kernel: Kernel) -> NativeExecutor | None:
    from remelt.engine.native_executor import NativeExecutor

    try:
        return NativeExecutor(kernel) if NativeExecutor.suits(kernel) else None
    except ValueError:  # too large for it
        return None


class TorchTiles:
    """A kernel run by torch, with what is done to its results beside arithmetic."""

    def __init__(self, executor: TorchExecutor | DirectExecutor) -> None:
        self.executor = executor
        self.kernel = executor.kernel

    def step(self, run: TaskRun) -> int:
        """As the plan found."""
        return run.planned.cost.tile

    def tile(self, run: TaskRun, numbers: Sequence[float], begin: int, end: int) -> None:
        """Compute some elements: write what goes to results, keep what stays whole, tell what is not finite."""
        sources = []
        for source in self.kernel.sources:
            if source.held:
                sources.append(run.whole[source.register].view(-1)[begin:end])
                continue
            load = run.program.instructions[source.register]
            assert isinstance(load, Load)
            raw = run.raw(load, begin, end)
            if not run.shows_all and not is_finite(raw):
                run.blame(load, raw)
            sources.append(raw)
        results = self.executor.run(sources, numbers, end - begin)
        for target, values in zip(self.kernel.targets, results, strict=True):
            if target.output is not None:
                run.write(target.output, values, begin)
            elif target.register is not None:
                run.whole[target.register].view(-1)[begin:end] = values
        run.place.scratch.reset()


def run_traced(executor: Executor, run: TaskRun, start: int, end: int) -> bool:
    """Run a sweep by its kernel; False where its numbers have no value, which the methods themselves then tell."""
    numbers: Any = run.numbers_of(executor.kernel)
    if numbers is None:
        return False
    tile = executor.step(run)
    for begin in range(start, max(end, start + 1), tile):
        run.pause()
        executor.tile(run, numbers, begin, min(begin + tile, end))
    return True


def plain_values(instruction: Apply, run: TaskRun) -> dict[str, Any]:
    """The arguments of a method that are no tensors, by name."""
    return {
        name: run.argument(argument, {})
        for name, argument in instruction.kwargs
        if not isinstance(argument, (Register, Bundle))
    }
