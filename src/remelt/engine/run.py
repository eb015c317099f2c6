"""Running a plan: threads take units in reading order within the memory budget; progress comes out as it happens."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch

from remelt.check.keys import Task
from remelt.check.program import Load, Output, Program, compact
from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.engine.cache import Cache, Recall
from remelt.engine.finite import FiniteReport, NonFinite, is_finite
from remelt.engine.known import Known
from remelt.engine.pages import Pages
from remelt.engine.scratch import Scratch, keep_freed_memory
from remelt.engine.sink import Sink
from remelt.engine.survey import Survey
from remelt.engine.sweeps import Kernels
from remelt.engine.tally import Tallies
from remelt.engine.tiles import TaskRun
from remelt.engine.units import Queue, SharedTask, Unit, elements, in_batches, units_of
from remelt.engine.workplace import Stopped, Workplace
from remelt.errors import NonFiniteError
from remelt.formats.checkpoint import Checkpoint
from remelt.planning.cost import TILE, task_cost
from remelt.planning.passes import Sweep, schedule
from remelt.planning.plan import Plan, PlannedTask
from remelt.tensors import TORCH, byte_range, tensor_over

_PATIENCE = 0.05
"""Seconds between two looks of the main thread at the progress, and for an interrupt."""


@dataclass(frozen=True)
class Progress:
    """How far a merge is: bytes of results written, of how many."""

    done: int
    total: int


@dataclass(frozen=True)
class Execution:
    """How to run a plan: where inputs and results are, on which device, and what to do about NaN and infinities."""

    checkpoints: Mapping[int, Checkpoint]
    labels: Mapping[int, str]
    sinks: Sequence[Sink]
    nonfinite: NonFinite = "error"
    device: str = "cpu"
    executor: str = "torch"
    """What runs kernels: ``native``, ``torch``, or ``device`` for the device that is named."""
    mapped: bool = True
    """Whether inputs are looked at where they are mapped, rather than read."""
    cached: bool = True
    """Whether all files fit in memory; otherwise their pages are let go once nothing needs them."""
    tallies: Tallies = field(default_factory=Tallies)
    cache: Cache | None = None
    """What earlier merges found, and later ones may use."""
    identities: Mapping[int, str | None] = field(default_factory=dict)
    """What tells the content of each input from others, for the cache."""
    sources: Sequence[Sequence[int]] = ()
    """For each result, the models that may stand in where a tensor counts as missing, in order."""


def run(plan: Plan, execution: Execution, report: FiniteReport) -> Iterator[Progress]:
    """Run the plan, yielding progress; the results are complete in their sinks when it ends.

    Raises `NonFiniteError` with all keys where NaN or infinities are refused, and whatever a method raised. Closing
    the iterator early stops the threads.
    """
    yield from _Run(plan, execution, report).events()


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait for all threads, also through interrupts, which are raised then: what they use is not closed before."""
    interrupted = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted


class _Run:
    def __init__(self, plan: Plan, execution: Execution, report: FiniteReport) -> None:
        self.plan, self.execution, self.report = plan, execution, report
        self.kept = 0
        held = sum(output.size for output in plan.outputs if output.path is None)
        held += sum(checkpoint.held for checkpoint in execution.checkpoints.values())
        self.rest = list(in_batches(self.remaining()))
        self.total = sum(info.nbytes for planned in plan.tasks for _, _, info in planned.task.outputs)
        self.stop = threading.Event()
        self.ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.tallies = execution.tallies
        self.pages = Pages(execution.checkpoints, execution.sinks, drops=not execution.cached)
        self.place = Workplace(
            checkpoints=execution.checkpoints,
            labels=execution.labels,
            sinks=execution.sinks,
            report=report,
            compute=TORCH[DType.parse(plan.compute_dtype)],
            device=torch.device(execution.device),
            stopped=self.stop.is_set,
            tallies=self.tallies,
            mapped=execution.mapped,
            kernels=Kernels(execution.executor),
            cache=execution.cache,
            identities=execution.identities,
        )

        counting = (plan.tasks, plan.counted) if self.rest else ((), ())
        self.survey = Survey(*counting, self.surveyed, execution.cache, self.recall)
        self.units = Queue(self.survey.begin(), max(plan.memory_budget - held, 0))
        self.fallback = replace(self.place, device=torch.device("cpu"), kernels=Kernels("torch"), scratch=Scratch())
        self.in_memory = threading.Lock()

    def events(self) -> Iterator[Progress]:
        keep_freed_memory()
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(self.plan.threads)]
        before = torch.get_num_threads()
        running = len(threads)
        yield Progress(self.kept, self.total)
        torch.set_num_threads(1)
        try:
            for thread in threads:
                thread.start()
            while running:
                try:
                    error = self.ended.get(timeout=_PATIENCE)
                except queue.Empty:
                    yield Progress(self.kept + self.tallies.written, self.total)
                    continue
                if error is not None:
                    raise error
                running -= 1
            self.pages.finish()
            yield Progress(self.kept + self.tallies.written, self.total)
        finally:
            self.stop.set()
            self.units.close()
            _join(threads)
            torch.set_num_threads(before)
        self.refuse_nonfinite()

    def refuse_nonfinite(self) -> None:
        """Refuse NaN and infinities that the policy does not settle; what overflows, none but ``keep`` settles."""
        policy, report = self.execution.nonfinite, self.report
        if policy == "error" and report.inputs:
            raise NonFiniteError(
                "\n".join(["NaN or infinity, and nothing was published:", *report.describe()]),
                hint="--nonfinite keep merges them as they are, --nonfinite missing treats such tensors as missing",
            )
        if policy != "keep" and report.results:
            raise NonFiniteError(
                "\n".join(["numbers that are too large, and nothing was published:", *report.describe()]),
                hint="--dtype bf16 or fp32 holds larger ones; --nonfinite keep writes infinities, in F8_E4M3 448",
            )

    def remaining(self) -> Iterator[Unit]:
        """What an earlier run has not finished."""
        counted: SharedTask | None = None
        for unit in units_of(self.plan.tasks, whole=self.execution.nonfinite == "missing"):
            ranges = [
                (self.execution.sinks[root], key, *byte_range(info, *unit.results))
                for root, key, info in unit.planned.task.outputs
            ]
            if all(sink.done(key, begin, end) for sink, key, begin, end in ranges if begin < end) and any(
                begin < end for _, _, begin, end in ranges
            ):
                if unit.shared is None or unit.shared is not counted:  # each of its slices leads to all of it
                    self.kept += sum(end - begin for _, _, begin, end in ranges)
                counted = unit.shared
            else:
                yield unit

    def recall(self, planned: PlannedTask, known: Known) -> Recall | None:
        """What a task is known by in the cache."""
        return TaskRun(planned, self.place, known).recall

    def surveyed(self) -> list[Unit]:
        """What is to be done once the sums across tensors are known."""
        for unit in self.rest:
            if unit.shared is not None and self.survey.sums:
                unit.shared.known.sums.update(self.survey.known_of(unit.planned).sums)
        return self.rest

    def work(self) -> None:
        try:
            torch.set_num_threads(1)  # MKL counts its threads apart in each of ours, and bits depend on how many
            tally = self.tallies.mine()
            unit: Unit | None = None
            following: Sequence[Unit] = ()
            while not self.stop.is_set():
                begun = perf_counter()
                unit = self.units.take(unit, following)
                tally.waiting += perf_counter() - begun
                if unit is None:
                    break
                following = self.one(unit)
                self.place.scratch.keep_within(self.units.budget // self.plan.threads)
                if unit.survey is None and (unit.shared is None or unit.shared.is_complete):
                    self.pages.let_go(unit)
        except Stopped:
            pass
        except BaseException as error:
            self.ended.put(error)
        self.ended.put(None)

    def one(self, unit: Unit) -> Sequence[Unit]:
        """Do a unit; the units that follow from it."""
        if unit.survey is not None:
            return self.count(unit, unit.survey)
        if unit.shared is not None:
            return self.share(unit, unit.shared)
        for planned in (unit.planned, *unit.more):
            if self.execution.nonfinite == "missing":
                for one in self.replaced(planned):
                    self.run_whole(one, keep=one is planned)
            else:
                self.run_whole(planned, unit.start, unit.stop)
        return ()

    def run_whole(self, planned: PlannedTask, start: int = 0, stop: int | None = None, *, keep: bool = True) -> None:
        """Run a task on the device, or, where that has no room for it, in memory: one such task at a time."""
        try:
            TaskRun(planned, self.place, self.survey.known_of(planned)).run(start, stop, keep=keep)
        except torch.OutOfMemoryError:
            with self.in_memory:
                TaskRun(planned, self.fallback, self.survey.known_of(planned)).run(start, stop, keep=keep)

    def count(self, unit: Unit, survey: Survey) -> Sequence[Unit]:
        """Do what a round across all tensors needs of a task; the units after it, where this was the last of it."""
        way = survey.way(unit.planned)
        assert way is not None
        task = TaskRun(unit.planned, self.place, survey.known_of(unit.planned))
        task.take(way[:-1])
        last = way[-1]
        assert isinstance(last, Sweep)
        assert unit.stop is not None
        return list(survey.add(unit, task.stretch(last, unit.start, unit.stop, elements(unit.planned))))

    def share(self, unit: Unit, shared: SharedTask) -> Sequence[Unit]:
        """Do a slice of a pass; the slices of the next one, where this was the last of it."""
        task = TaskRun(unit.planned, self.place, shared.known)
        task.spoiled = shared.spoiled
        assert unit.stop is not None
        if task.recall is not None:
            shared.recall(task.recall)
        needed = task.needs(shared.sweep)
        found = task.stretch(shared.sweep, unit.start, unit.stop, elements(unit.planned)) if needed else {}
        following = shared.add(unit, found, task.checksums, spoiled=task.spoiled, needs=task.needs)
        if shared.is_complete and not following:
            task.checksums, task.spoiled = shared.checksums, shared.spoiled
            task.finish()
        return following

    def replaced(self, planned: PlannedTask) -> list[PlannedTask]:
        """The task, or where a tensor that it reads is not finite, copies from the first models that are."""
        task, program = planned.task, planned.task.program
        spoiled = {
            (load.input, key)
            for load in program.loads
            if load not in program.mended and not self.finite(load.input, key := load.key or task.key)
        }
        if not spoiled:
            return [planned]
        affected = program.reached(
            [
                register
                for register, load in enumerate(program.instructions)
                if isinstance(load, Load) and (load.input, load.key or task.key) in spoiled
            ]
        )
        tasks: list[Task] = []
        untouched = []
        for output, (root, key, info) in zip(program.outputs, task.outputs, strict=True):
            source = self.source(root, key, info, spoiled) if output.register in affected else None
            if source is None:
                untouched.append((output, (root, key, info)))
                continue
            self.report.add_replaced(key, self.execution.labels[source])
            copied = Program((Load(source, None),), (Output(root, None, 0, source, None),), (None,))
            tasks.append(Task(key, copied, (), info.shape, ((root, key, info),), copy=True))
        if untouched:
            rest = compact(program.instructions, [output for output, _ in untouched], program.shapes)
            tasks.append(replace(task, program=rest, outputs=tuple(outputs for _, outputs in untouched)))
        passes = [schedule(one.program) for one in tasks]
        return [
            PlannedTask(one, how, task_cost(one, how, self.place.compute.itemsize), 0, how.divisible)
            for one, how in zip(tasks, passes, strict=True)
        ]

    def source(self, root: int, key: str, info: TensorInfo, spoiled: set[tuple[int, str]]) -> int | None:
        """The first model with a finite tensor of that shape, else the first with one of that shape, if any."""
        models = self.execution.checkpoints
        having = [
            index
            for index in self.execution.sources[root]
            if (there := models[index].tensors.get(key)) is not None and there.shape == info.shape
        ]
        sound = (index for index in having if (index, key) not in spoiled and self.finite(index, key))
        return next(sound, having[0] if having else None)

    def finite(self, index: int, key: str) -> bool:
        """Whether an input's tensor is finite, looked at tile by tile; told where it is not."""
        checkpoint = self.execution.checkpoints[index]
        info = checkpoint.tensors[key]
        step = TILE * info.dtype.itemsize
        for begin in range(0, info.nbytes if info.dtype.is_float else 0, step):
            if self.stop.is_set():
                raise Stopped
            if not is_finite(tensor_over(checkpoint.read(key, begin, min(begin + step, info.nbytes)), info.dtype)):
                self.report.add_input(self.execution.labels[index], key)
                return False
        return True
