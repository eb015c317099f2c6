"""Sweeps that were traced: a kernel is made once for all keys of a kind, tried on a sample, and run by an executor."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from remelt.check.program import Apply, Bundle, Load, Register
from remelt.engine.finite import is_finite
from remelt.engine.known import add_part
from remelt.engine.language import Kernel, Source
from remelt.engine.sample import Sample
from remelt.engine.torch_executor import DirectExecutor, Sums, TorchExecutor, torch_executors
from remelt.engine.torch_program import PADDING
from remelt.engine.tracing import trace
from remelt.planning.cost import CHUNK
from remelt.planning.passes import Sweep
from remelt.tensors import FROM_TORCH

if TYPE_CHECKING:
    from remelt.engine.device_executor import DeviceExecutor
    from remelt.engine.native_executor import NativeExecutor
    from remelt.engine.tiles import TaskRun

_READ = 2**23
"""Bytes of inputs that a thread reads into memory at a time, while smaller tiles are possible."""


class Executor(Protocol):
    """What runs a kernel on some elements of a task."""

    kernel: Kernel

    def step(self, run: TaskRun) -> int:
        """Elements that one call takes."""

    def tile(self, run: TaskRun, numbers: Any, begin: int, end: int) -> None:
        """Compute some elements: write what goes to results, keep what stays whole, tell what is not finite."""


class Kernels:
    """The kernels of a merge: traced at the first key of each kind, and found again for the others."""

    def __init__(self, executor: str = "torch") -> None:
        self.executor = executor
        """``native``, ``torch`` or ``device``."""
        self._found: dict[int, tuple[Sweep, Executor | None]] = {}
        """By the identity of a sweep, which all keys of one kind share: of one program and the same element types."""
        self._lock = threading.Lock()

    def of(self, run: TaskRun, sweep: Sweep) -> Executor | None:
        """What runs a sweep of a task; None where its methods are called tile by tile."""
        known = self._found.get(id(sweep))
        if known is None:
            with self._lock:
                known = self._found.get(id(sweep))
                if known is None:
                    known = self._found[id(sweep)] = sweep, self._make(run, sweep)
        return known[1]

    def _make(self, run: TaskRun, sweep: Sweep) -> Executor | None:
        if run.task.copy:
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
        if self.executor == "device":
            return _on_device(kernel, sample, numbers, run.place.device)
        if (
            self.executor == "native"
            and (made := _native(kernel)) is not None
            and sample.agrees(*made.sample(sample, numbers))
        ):
            return made
        executor = next((one for one in torch_executors(kernel) if _agrees(one, sample, numbers, run)), None)
        run.place.scratch.reset()
        return None if executor is None else TorchTiles(executor)


def _agrees(executor: TorchExecutor | DirectExecutor, sample: Sample, numbers: Sequence[float], run: TaskRun) -> bool:
    """Whether what runs a kernel by torch gives the sample's bits."""
    try:
        found, sums, _ = executor.run(sample.sources, numbers, PADDING, run.place.scratch, looks=False)
    except (RuntimeError, TypeError):  # this version of torch has no such function
        return False
    return sample.agrees(found, totals(sums))


def _on_device(kernel: Kernel, sample: Sample, numbers: Sequence[float], device: torch.device) -> DeviceExecutor | None:
    from remelt.engine.device_executor import DeviceExecutor

    if not DeviceExecutor.suits(kernel, device):
        return None
    made = DeviceExecutor(kernel, device)
    return made if sample.agrees(*made.sample(sample.sources, numbers)) else None


def _native(kernel: Kernel) -> NativeExecutor | None:
    from remelt.engine.native_executor import NativeExecutor

    try:
        return NativeExecutor(kernel) if NativeExecutor.suits(kernel) else None
    except (OverflowError, ValueError):  # too large for it
        return None


def totals(sums: Sums) -> list[torch.Tensor]:
    """What a run by torch adds to each sum, all chunks together."""
    found: dict[str, Any] = {}
    for place, part in enumerate(sums):
        add_part(found, str(place), part)
    return [torch.as_tensor(value, dtype=torch.float64) for value in found.values()]


class TorchTiles:
    """A kernel run by torch, with what is done to its results beside arithmetic."""

    def __init__(self, executor: TorchExecutor | DirectExecutor) -> None:
        self.executor = executor
        self.kernel = executor.kernel

    def step(self, run: TaskRun) -> int:
        """As many as the executor takes at best, or fewer where what they hold would be too much."""
        width = sum(self._width(run, source) for source in self.kernel.sources)
        held = self.executor.width
        room = max(run.planned.cost.tiles - self.executor.registers, 0)
        tile = self.executor.tile
        while tile > CHUNK and (tile * width > _READ or tile * (width + held) > room):
            tile //= 2
        return tile

    @staticmethod
    def _width(run: TaskRun, source: Source) -> int:
        """Bytes of memory that an element of a source takes while a tile is computed."""
        is_view = source.held or (run.place.mapped and run.is_streamed(source.register))
        return 0 if is_view else source.dtype.itemsize

    def tile(self, run: TaskRun, numbers: Sequence[float], begin: int, end: int) -> None:
        """Compute some elements: write what goes to results, keep what stays whole, tell what is not finite."""
        sources = []
        for source in self.kernel.sources:
            if source.held:
                sources.append(run.whole[source.register].view(-1)[begin:end])
                continue
            load = run.program.instructions[source.register]
            assert isinstance(load, Load)
            sources.append(run.raw(load, begin, end))
        results, sums, suspects = self.executor.run(
            sources, numbers, end - begin, run.place.scratch, looks=not run.shows_all
        )
        for place in suspects:
            load = run.program.instructions[self.kernel.sources[place].register]
            if isinstance(load, Load) and not is_finite(sources[place]):
                run.blame(load, sources[place])
        for target, values in zip(self.kernel.targets, results, strict=True):
            if target.output is not None:
                run.write(target.output, values, begin)
            elif target.register is not None:
                run.whole[target.register].view(-1)[begin:end] = values
        for partial, found in zip(self.kernel.partials, sums, strict=True):
            add_part(run.partials.setdefault(partial.register, {}), partial.name, found)
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
