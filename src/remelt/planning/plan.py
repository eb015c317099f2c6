"""The plan: every task with its passes and cost, in reading order, and the totals that a person decides by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from remelt.check.inputs import Input
from remelt.check.keys import KeyReport, Task
from remelt.check.program import Apply, Load, Program
from remelt.core.tensor_info import TensorInfo, total_bytes
from remelt.core.units import format_bytes, format_seconds
from remelt.errors import BudgetError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.layout import OutputLayout
from remelt.planning.cost import COPIED, DEVICE_TILE, SAMPLE, SLICE, SMALL, Cost, CostModel, grain
from remelt.planning.passes import Schedule, Sweep, reads, samples, schedule

_READ_RATE = 3.0e9
_WRITE_RATE = 1.2e9
_COMPUTE_RATE = 4.0e8
"""Bytes, bytes, and elements a second a thread: what a laptop with an NVMe disk reaches; for estimates only."""
_OPERATION_RATE = 1.0e10
"""Floating-point operations a second a thread that decompositions reach."""
_LONG = 60.0
"""Seconds of a method that are worth a warning."""


@dataclass(frozen=True)
class PlannedTask:
    """A task, how it is streamed, and what it costs. ``divisible`` tasks may be cut into slices for several threads."""

    task: Task
    passes: Schedule
    cost: Cost
    read: int
    divisible: bool

    def grain(self, sweep: Sweep) -> int:
        """At multiples of how many elements the tiles of a pass begin."""
        if not sweep.rows:
            return 1
        shape = self.task.shape if sweep.shape is None else sweep.shape
        return grain(shape, sweep.rows, sums=bool(sweep.reductions), batched=sweep.batched)


@dataclass(frozen=True)
class PlannedInput:
    """What the plan says of one input."""

    label: str
    path: str | None
    arch: str | None
    evidence: str
    tensors: int
    size: int
    read_tensors: int
    idle_tensors: int


@dataclass(frozen=True)
class PlannedOutput:
    """One result: where it goes (None: memory), its tensors, and its layout on disk."""

    path: str | None
    space: str
    tensors: Mapping[str, TensorInfo]
    layout: OutputLayout | None

    @property
    def size(self) -> int:
        """Bytes of the whole output, headers included."""
        return total_bytes(self.tensors.values()) if self.layout is None else self.layout.total_bytes


@dataclass(frozen=True)
class Plan:
    """What a merge will do: inputs, outputs, tasks in order, and its costs in bytes and seconds.

    ``peak_memory`` is what remelt holds beside the interpreter and torch; mapped pages of input files are not in it,
    as the system reclaims them at will.
    """

    inputs: tuple[PlannedInput, ...]
    outputs: tuple[PlannedOutput, ...]
    tasks: tuple[PlannedTask, ...]
    counted: tuple[PlannedTask, ...]
    """What is read for sums across all tensors alone."""
    threads: int
    memory_budget: int
    peak_memory: int
    peak_step: str
    """Which tensor sets the peak, and by which methods."""
    bytes_read: int
    bytes_written: int
    seconds: float
    compute_dtype: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Resources:
    """What a merge may use: threads, bytes of memory, and bytes of an element while computing."""

    threads: int
    memory: int
    itemsize: int
    compute_dtype: str
    device: bool = False
    """Whether tensors travel to another device."""
    scans: bool = False
    """Whether every input is read once more beforehand, to look for NaN and infinities."""


def make_plan(
    report: KeyReport,
    inputs: Mapping[int, Input],
    outputs: Sequence[PlannedOutput],
    resources: Resources,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Plan:
    """The plan of checked tasks; `BudgetError` where one of them cannot fit the memory, with the number it needs."""
    checkpoints = {index: given.checkpoint for index, given in inputs.items()}
    tasks = _planned(report.tasks, checkpoints, resources)
    programs = {id(task.program): task.program for task in report.tasks if report.counted}.values()
    counts = [task for (_, step), task in report.counted.items() if any(one.applies(step) for one in programs)]
    results, counted = tasks, _planned(counts, checkpoints, resources)
    tasks = [*results, *counted]
    in_memory = sum(output.size for output in outputs if output.path is None)
    held = sum(checkpoint.held for checkpoint in checkpoints.values())
    largest = max(tasks, key=lambda planned: planned.cost.memory, default=None)
    needed = in_memory + held + (largest.cost.memory if largest is not None else 0)
    if largest is not None and needed > resources.memory:
        _refuse_budget(largest, needed, in_memory, resources.memory)
    units = sorted((planned.cost.memory for planned in tasks), reverse=True)
    parallel = sum(units[: resources.threads])
    for planned in tasks:
        if planned.divisible:  # each of its slices is a unit that holds as much
            slices = min(resources.threads, -(-max(math.prod(planned.task.shape), 1) // SLICE))
            parallel = max(parallel, planned.cost.memory * slices + sum(units[: resources.threads - slices]))
    read = sum(planned.read for planned in tasks) * (2 if resources.scans else 1)
    written = sum(output.size for output in outputs if output.path is not None)
    work = sum(planned.cost.work for planned in tasks)
    heavy = _heavy(tasks, resources.threads)
    streaming = read / _READ_RATE + written / _WRITE_RATE
    return Plan(
        inputs=tuple(_planned_inputs(inputs, tasks, report)),
        outputs=tuple(outputs),
        tasks=tuple(results),
        counted=tuple(counted),
        threads=resources.threads,
        memory_budget=resources.memory,
        peak_memory=min(in_memory + held + parallel, resources.memory),
        peak_step="" if largest is None else _step(largest),
        bytes_read=read,
        bytes_written=written,
        seconds=max(streaming, work / _COMPUTE_RATE / resources.threads) + sum(heavy.values()),
        compute_dtype=resources.compute_dtype,
        warnings=(*warnings, *_slow(heavy, tasks)),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Streamed:
    """How the tasks of one program are streamed, what each reads how often, and their costs by shape."""

    program: Program
    passes: Schedule
    model: CostModel
    reads: list[tuple[Load, int]]
    samples: list[tuple[Load, int]]
    costs: dict[tuple[int, ...], Cost] = field(default_factory=dict)

    def cost(self, task: Task) -> Cost:
        """The cost of one task."""
        found = self.costs.get(task.shape)
        if found is None:
            found = self.costs[task.shape] = self.model.cost(task)
        return found

    def bytes_read(self, key: str, tensors: Mapping[int, Mapping[str, TensorInfo]]) -> int:
        """Bytes that one task reads, each sweep over a tensor counted."""
        read = sum([tensors[load.input][load.key or key].stored * count for load, count in self.reads])
        for load, count in self.samples:
            info = tensors[load.input][load.key or key]
            read += min(SAMPLE * info.dtype.itemsize, info.stored) * count
        return read


def _planned(tasks: Sequence[Task], checkpoints: Mapping[int, Checkpoint], resources: Resources) -> list[PlannedTask]:
    tensors = {index: checkpoint.tensors for index, checkpoint in checkpoints.items()}
    copying = {index for index, checkpoint in checkpoints.items() if type(checkpoint).beside is not Checkpoint.beside}
    taken = DEVICE_TILE if resources.device else COPIED  # the most that an executor reads at a time
    known: dict[tuple[int, bool], _Streamed] = {}
    planned = []
    for task in tasks:
        small = math.prod(task.shape) <= SMALL
        identity = id(task.program), small
        found = known.get(identity)
        if found is None:
            passes = schedule(task.program, small=small)
            model = CostModel(task.program, passes, resources.itemsize, device=resources.device)
            counts = reads(task.program, passes), samples(task.program, passes)
            found = known[identity] = _Streamed(task.program, passes, model, *counts)
        read = found.bytes_read(task.key, tensors)
        cost = found.cost(task)
        if copying:
            loads = [load for load, _ in found.reads if load.input in copying]
            beside = sum(checkpoints[load.input].beside(load.key or task.key, taken) for load in loads)
            beside += max((checkpoints[load.input].scratch for load in loads), default=0)
            cost = replace(cost, memory=cost.memory + beside) if beside else cost
        planned.append(PlannedTask(task, found.passes, cost, read, found.passes.divisible))
    return planned


def _heavy(tasks: Sequence[PlannedTask], threads: int) -> dict[str, float]:
    """Seconds that methods take which decompose or multiply matrices, by name."""
    found: dict[str, float] = {}
    for planned in tasks:
        for name, operations in planned.cost.heavy:
            found[name] = found.get(name, 0.0) + operations / _OPERATION_RATE / threads
    return found


def _slow(heavy: Mapping[str, float], tasks: Sequence[PlannedTask]) -> Iterator[str]:
    """What takes minutes, and what would not."""
    for name, seconds in heavy.items():
        if seconds < _LONG:
            continue
        calls = [
            (operations, planned)
            for planned in tasks
            for found, operations in planned.cost.heavy
            if found == name and operations
        ]
        _, largest = max(calls, key=lambda call: call[0])
        methods = [one.method for one in largest.task.program.instructions if isinstance(one, Apply)]
        faster = next(method.declaration.faster for method in methods if method.name == name)
        yield (
            f"{name} takes about {format_seconds(seconds)} for {len(calls)} tensors, the largest {largest.task.key} "
            f"{list(largest.task.shape)}{f'; faster: {faster}' if faster else ''}"
        )


def _step(planned: PlannedTask) -> str:
    """A task in words: its key, shape and methods."""
    methods = sorted({one.method.name for one in planned.task.program.instructions if isinstance(one, Apply)})
    return f"{planned.task.key} {list(planned.task.shape)} by {', '.join(methods) or 'copying'}"


def _refuse_budget(planned: PlannedTask, needed: int, in_memory: int, budget: int) -> None:
    held = f", {format_bytes(in_memory)} of it for the result" if in_memory else ""
    raise BudgetError(
        f"the step with the highest peak needs {format_bytes(needed)} of memory{held}, but --memory allows "
        f"{format_bytes(budget)}: {_step(planned)}",
        hint=f"--memory {-(-needed // 2**20)}MiB or more" + (", or write to a file" if in_memory else ""),
    )


def _planned_inputs(
    inputs: Mapping[int, Input], tasks: Sequence[PlannedTask], report: KeyReport
) -> Iterator[PlannedInput]:
    used = _keys_read(tasks)
    for index, given in inputs.items():
        if given.model.part is not None and not given.checkpoint.tensors:  # as of a shared expert that its style lacks
            continue
        arch = given.detection.arch
        yield PlannedInput(
            label=given.label,
            path=None if given.checkpoint.path is None else str(given.checkpoint.path),
            arch=given.model.arch or (arch.name if arch is not None else None),
            evidence=given.detection.evidence,
            tensors=len(given.checkpoint.tensors),
            size=total_bytes(given.checkpoint.tensors.values()),
            read_tensors=len(used.get(index, ())),
            idle_tensors=report.idle.get(given.label, 0),
        )


def _keys_read(tasks: Sequence[PlannedTask]) -> dict[int, set[str]]:
    """Which keys of each input are read."""
    programs: dict[int, tuple[Program, list[str]]] = {}
    for planned in tasks:
        programs.setdefault(id(planned.task.program), (planned.task.program, []))[1].append(planned.task.key)
    used: dict[int, set[str]] = {}
    for program, keys in programs.values():
        for load in program.loads:
            used.setdefault(load.input, set()).update(keys if load.key is None else (load.key,))
    return used
