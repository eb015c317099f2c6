"""Sweeps that were traced: a kernel is made once for all keys of a kind, tried on a sample, and run by an executor."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from remelt.check.program import Apply, Bundle, Load, Register
from remelt.core.dtype import DType
from remelt.engine.finite import is_finite
from remelt.engine.language import Kernel
from remelt.engine.tensors import FROM_TORCH, TORCH
from remelt.engine.torch_executor import PADDING, torch_executor
from remelt.engine.tracing import trace
from remelt.planning.passes import Sweep

if TYPE_CHECKING:
    from remelt.engine.tiles import TaskRun


@dataclass(frozen=True)
class Traced:
    """A kernel with what runs it."""

    kernel: Kernel
    executor: Any


class Kernels:
    """The kernels of a merge: traced at the first key of each kind, and found again for the others."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], tuple[Sweep, Traced | None]] = {}
        self._lock = threading.Lock()

    def of(self, run: TaskRun, sweep: Sweep) -> Traced | None:
        """What runs a sweep of a task; None where its methods are called tile by tile."""
        if sweep.reductions or run.task.copy or run.place.device.type != "cpu":
            return None
        instructions = run.program.instructions
        sources = {
            register: run.stored_type(found)
            for register in sweep.order
            if isinstance(found := instructions[register], Load)
        }
        targets = [run.task.outputs[position][2].dtype for position in sweep.outputs]
        identity = id(sweep), tuple(sources.values()), tuple(targets), tuple(sorted(run.whole))
        with self._lock:
            known = self._found.get(identity)
            if known is None:
                known = self._found[identity] = sweep, self._make(run, sweep, sources, targets)
        return known[1]

    def _make(
        self, run: TaskRun, sweep: Sweep, sources: Mapping[int, DType], targets: Sequence[DType]
    ) -> Traced | None:
        compute = FROM_TORCH[run.place.compute]
        kernel = trace(run.program, sweep, sources, targets, run.whole, compute)
        if kernel is None:
            return None
        traced = Traced(kernel, torch_executor(kernel))
        return traced if _is_believed(traced, run, sweep) else None


def _is_believed(traced: Traced, run: TaskRun, sweep: Sweep) -> bool:
    """Whether a kernel gives the bits of the methods themselves on a sample."""
    from remelt.engine.tiles import TaskRun

    numbers = run.numbers_of(traced.kernel)
    if numbers is None:
        return True
    drawn = torch.Generator().manual_seed(0)
    samples = {}
    for source in traced.kernel.sources:
        sample = torch.randn(PADDING, generator=drawn, dtype=torch.float64)
        sample[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
        samples[source.register] = sample.to(TORCH[source.dtype])

    class Sampled(TaskRun):
        def load(self, load: Load, begin: int, end: int) -> torch.Tensor:
            register = self.program.instructions.index(load)
            return samples[register].to(self.place.compute)

    sampled = Sampled(run.planned, run.place)
    sampled.conclusions, sampled.sums = run.conclusions, run.sums
    sampled.whole = {
        register: samples.get(register, held.reshape(-1)[:PADDING]) for register, held in run.whole.items()
    }
    values = sampled.evaluate(sweep, 0, PADDING, PADDING)
    results = traced.executor.run([samples[source.register] for source in traced.kernel.sources], numbers, PADDING)
    for target, result in zip(traced.kernel.targets, results, strict=True):
        register = target.register if target.output is None else run.program.outputs[target.output].register
        assert register is not None
        expected, stored = values[register].to(TORCH[target.dtype]), result.to(TORCH[target.dtype])
        if not torch.equal(expected.view(torch.uint8), stored.view(torch.uint8)):
            return False
    return True


def run_traced(traced: Traced, run: TaskRun, sweep: Sweep, start: int, end: int) -> bool:
    """Run a sweep by its kernel; False where its numbers have no value, which the methods themselves then tell."""
    numbers = run.numbers_of(traced.kernel)
    if numbers is None:
        return False
    kernel, tile = traced.kernel, run.planned.cost.tile
    instructions = run.program.instructions
    for begin in range(start, max(end, start + 1), tile):
        run.pause()
        finish = min(begin + tile, end)
        sources = []
        for source in kernel.sources:
            if source.held:
                sources.append(run.whole[source.register].view(-1)[begin:finish])
                continue
            load = instructions[source.register]
            assert isinstance(load, Load)
            raw = run.raw(load, begin, finish)
            if not run.shows_all and not is_finite(raw):
                run.blame(load, raw)
            sources.append(raw)
        for target, values in zip(kernel.targets, traced.executor.run(sources, numbers, finish - begin), strict=True):
            if target.output is not None:
                run.write(target.output, values, begin)
            elif target.register is not None:
                run.whole[target.register].view(-1)[begin:finish] = values
        run.place.scratch.reset()
    return True


def plain_values(instruction: Apply, run: TaskRun) -> dict[str, Any]:
    """The arguments of a method that are no tensors, by name."""
    return {
        name: run.argument(argument, {})
        for name, argument in instruction.kwargs
        if not isinstance(argument, (Register, Bundle))
    }
