"""Units of work in reading order, and tensors that several threads sweep together, pass after pass."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remelt.engine.known import Fold, Known, Partials
from remelt.planning.cost import CHUNK, FOLD, SAMPLE, SLICE, SMALL
from remelt.planning.passes import Sweep
from remelt.planning.plan import PlannedTask

if TYPE_CHECKING:
    from remelt.engine.cache import Recall
    from remelt.engine.survey import Survey

_BATCH = 2**18
"""Elements of tasks that are taken together."""
_TOGETHER = 32
"""The most tasks that are taken together."""


@dataclass(frozen=True)
class Unit:
    """What one thread takes at a time: a task, some elements of one, or those of one pass of a shared one."""

    planned: PlannedTask
    start: int = 0
    stop: int | None = None
    shared: SharedTask | None = None
    more: tuple[PlannedTask, ...] = ()
    """Small tasks that are done after the first."""
    survey: Survey | None = None
    """What it adds to, where it only counts."""

    @property
    def results(self) -> tuple[int, int | None]:
        """The elements of results that are complete once it is done, and what it leads to: all of a shared task's."""
        return (self.start, self.stop) if self.shared is None else (0, None)

    @property
    def memory(self) -> int:
        """Bytes that it holds at its peak."""
        return max([self.planned.cost.memory, *(planned.cost.memory for planned in self.more)])


class SharedTask:
    """A task of several passes whose slices any thread may take: a pass begins when the one before is complete."""

    def __init__(self, planned: PlannedTask) -> None:
        self.planned = planned
        self.known = Known()
        self.spoiled = False
        self.checksums = [0] * len(planned.task.outputs)
        self._sweeps = [one for one in planned.passes.passes if isinstance(one, Sweep) and not one.across]
        self._place = 0
        self._fold = Fold()
        self._lock = threading.Lock()
        self._is_recalled = False

    def recall(self, recall: Recall) -> None:
        """Take over, once, what earlier merges found of its sums."""
        with self._lock:
            if not self._is_recalled:
                recall.take_sums()
                self._is_recalled = True

    @property
    def sweep(self) -> Sweep:
        """The pass that is under way."""
        return self._sweeps[self._place]

    def units(self) -> list[Unit]:
        """The slices of the pass that is under way."""
        return [Unit(self.planned, start, stop, self) for start, stop in self._stretches()]

    def _stretches(self) -> list[tuple[int, int]]:
        return stretches(self.sweep, elements(self.planned), self.planned.grain(self.sweep))

    def add(
        self,
        unit: Unit,
        found: Partials,
        checksums: Sequence[int],
        *,
        spoiled: bool,
        needs: Callable[[Sweep], bool],
    ) -> list[Unit]:
        """A slice is done. The units of the next pass, once this was the last of a pass; none after the last pass.

        ``needs`` tells whether the sums so far leave a pass to be done.
        """
        with self._lock:
            assert unit.stop is not None
            self._fold.add(unit.start, unit.stop, found)
            self.spoiled |= spoiled
            self.checksums = [a + b for a, b in zip(self.checksums, checksums, strict=True)]
            if len(self._fold) < len(self._stretches()):
                return []
            self.known.settle(self._fold, elements(self.planned))
            self._fold = Fold()
            self._place += 1
            while not self.is_complete and not needs(self.sweep):
                self._place += 1
            return [] if self.is_complete else self.units()

    @property
    def is_complete(self) -> bool:
        """Whether all passes are done."""
        return self._place == len(self._sweeps)


def elements(planned: PlannedTask) -> int:
    """Elements of a task's results, or where it has none of its tensor."""
    outputs = planned.task.outputs
    return math.prod(outputs[0][2].shape if outputs else planned.task.shape)


def folds(size: int, grain: int = 1) -> list[tuple[int, int]]:
    """The slices of that many elements whose sums are added up apart: one at least, and the same for all threads."""
    step = max(FOLD // grain, 1) * grain
    return [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]


_PIECES = 32
"""The most places that a sample is taken from."""


def stretches(sweep: Sweep, size: int, grain: int = 1) -> list[tuple[int, int]]:
    """The slices whose sums are added up apart; a sample is one."""
    return [(0, size)] if sweep.sampled else folds(size, grain)


def pieces(begin: int, end: int) -> list[tuple[int, int]]:
    """The elements of a sample: all where there are few, or places that are spread over them."""
    size = end - begin
    count = min(_PIECES, size // CHUNK)
    if size <= SMALL:
        return [(begin, end)]
    starts = [begin + size * piece // count // CHUNK * CHUNK for piece in range(count)]
    return [(start, start + SAMPLE // count) for start in starts]


def units_of(tasks: Sequence[PlannedTask], *, whole: bool) -> Iterator[Unit]:
    """The units of tasks in order; ``whole`` where none may be cut."""
    for planned in tasks:
        size = elements(planned)
        if whole or not planned.divisible:
            yield Unit(planned)
        elif planned.passes.simple:
            (only,) = planned.passes.passes
            assert isinstance(only, Sweep)
            grain = planned.grain(only)
            step = max(SLICE // grain, 1) * grain
            if size <= step:
                yield Unit(planned)
            else:
                yield from (Unit(planned, start, min(start + step, size)) for start in range(0, size, step))
        elif size <= FOLD:
            yield Unit(planned)
        else:
            yield from SharedTask(planned).units()


def in_batches(units: Iterable[Unit]) -> Iterator[Unit]:
    """The same units, small tasks that follow each other together: threads ask for work, and wait, once for all."""
    batch: list[PlannedTask] = []
    size = 0
    for unit in units:
        numel = elements(unit.planned)
        if unit.shared is not None or unit.survey is not None or unit.stop is not None or numel > _BATCH:
            if batch:
                yield Unit(batch[0], more=tuple(batch[1:]))
                batch, size = [], 0
            yield unit
            continue
        batch.append(unit.planned)
        size += numel
        if len(batch) == _TOGETHER or size > _BATCH:
            yield Unit(batch[0], more=tuple(batch[1:]))
            batch, size = [], 0
    if batch:
        yield Unit(batch[0], more=tuple(batch[1:]))


class Queue:
    """Units that threads take from the front, and put there, while what they hold fits the memory budget."""

    def __init__(self, units: Iterable[Unit], budget: int) -> None:
        self._units = deque(units)
        self.budget = budget
        self._held = 0
        self._taken = 0
        self._waiting = 0
        self._closed = False
        self._condition = threading.Condition()

    def take(self, done: Unit | None = None, following: Sequence[Unit] = ()) -> Unit | None:
        """The next unit, which one at least may always take; None when no more will come.

        ``done`` is the unit that the thread took before, and ``following`` those that follow from it: they go to the
        front, as what they read was read just now.
        """
        with self._condition:
            if done is not None:
                self._taken -= 1
                self._held -= done.memory
                self._units.extendleft(reversed(following))
                if self._waiting:
                    self._condition.notify_all()
            while not self._closed:
                if self._units and (not self._taken or self._held + self._units[0].memory <= self.budget):
                    unit = self._units.popleft()
                    self._taken += 1
                    self._held += unit.memory
                    return unit
                if not self._units and not self._taken:
                    break
                self._waiting += 1
                self._condition.wait()
                self._waiting -= 1
            return None

    def close(self) -> None:
        """Give out no more units."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
