"""Sums over all tensors of a result together: each round looks at all of them before any of it is computed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from remelt.check.program import Apply
from remelt.engine.cache import Cache, Recall
from remelt.engine.known import Known, Partials, add_part
from remelt.engine.units import Unit, elements, folds
from remelt.errors import MethodError
from remelt.planning.passes import Pass, Sweep
from remelt.planning.plan import PlannedTask
from remelt.recipe.method import ELEMENTS

Round = tuple[int, int]
"""A step of the recipe, and the number of its round."""


class Survey:
    """The rounds of a merge that are across tensors, one after the other; ``then`` gives the units after them all.

    ``counted`` are tasks that have no results, but count all the same. What an earlier merge found is taken over from
    the ``cache``, in which ``recall`` says what a task is known by.
    """

    def __init__(
        self,
        tasks: Sequence[PlannedTask],
        counted: Sequence[PlannedTask],
        then: Callable[[], Iterable[Unit]],
        cache: Cache | None = None,
        recall: Callable[[PlannedTask, Known], Recall | None] = lambda planned, known: None,
    ) -> None:
        self.tasks, self._then = [*tasks, *counted], then
        self._cache, self._recall = cache, recall
        self._identity = b""
        self.sums: dict[int, dict[str, Any]] = {}
        """By step, of the rounds that are complete."""
        self._rounds = sorted({self._round(planned, one) for planned in tasks for one in _across(planned)})
        self._place = 0
        self._left = 0
        self._found: dict[str, Any] = {}
        self._ways: dict[tuple[int, Round], list[Pass]] = {}
        self._lock = threading.Lock()

    def begin(self) -> Iterable[Unit]:
        """The first units; those after the survey, where there is nothing to add up."""
        while self._place < len(self._rounds) and (found := self._recalled()) is not None:
            self._settle(found)
        if self._place == len(self._rounds):
            return self._then()
        units = list(self._units(self._rounds[self._place]))
        self._left = len(units)
        self._found = {}
        return units

    def _units(self, round_: Round) -> Iterator[Unit]:
        for planned in self.tasks:
            way = self.way(planned)
            if way is None:
                continue
            size = elements(planned)
            if len(way) == 1 and planned.divisible:
                yield from (Unit(planned, begin, end, survey=self) for begin, end in folds(size))
            else:
                yield Unit(planned, 0, size, survey=self)

    def way(self, planned: PlannedTask) -> list[Pass] | None:
        """The passes of a task up to that of the round under way, without results; None where it has no such pass."""
        round_ = self._rounds[self._place]
        known = self._ways.get((id(planned.passes), round_))
        if known is not None:
            return known
        way: list[Pass] = []
        for one in planned.passes.passes:
            if isinstance(one, Sweep) and one.across:
                if self._round(planned, one) == round_:
                    self._ways[id(planned.passes), round_] = [*way, one]
                    return self._ways[id(planned.passes), round_]
            elif not isinstance(one, Sweep) or one.reductions or one.gathers:
                way.append(replace(one, outputs=()) if isinstance(one, Sweep) and one.outputs else one)
        return None

    @staticmethod
    def _round(planned: PlannedTask, sweep: Sweep) -> Round:
        ((register, number),) = sweep.reductions
        instruction = planned.task.program.instructions[register]
        assert isinstance(instruction, Apply)
        return instruction.step, number

    def add(self, unit: Unit, found: Partials) -> Iterable[Unit]:
        """A unit is done: the units of the next round, once it was the last of this one."""
        with self._lock:
            for values in found.values():
                for name, value in values.items():
                    if not isinstance(value, torch.Tensor) or value.is_floating_point():
                        raise MethodError(
                            f"sums across tensors are counts, but {name} of {unit.planned.task.key} is none"
                        )
                    add_part(self._found, name, value)
            assert unit.stop is not None
            self._found[ELEMENTS] = self._found.get(ELEMENTS, 0) + unit.stop - unit.start
            self._left -= 1
            if self._left:
                return ()
            total = torch.tensor(self._found.pop(ELEMENTS), dtype=torch.float64)
            self._settle(self._found | {ELEMENTS: total})
            if self._cache is not None:
                self._cache.put(self._identity, self.sums[self._rounds[self._place - 1][0]])
            return self.begin()

    def _settle(self, found: Mapping[str, Any]) -> None:
        """A round is complete."""
        self.sums.setdefault(self._rounds[self._place][0], {}).update(found)
        self._place += 1

    def _recalled(self) -> Mapping[str, Any] | None:
        """What an earlier merge found in this round, and those before it of the same step."""
        if self._cache is None:
            return None
        step, number = self._rounds[self._place]
        digest = hashlib.blake2b(digest_size=16)
        for planned in self.tasks:
            if self.way(planned) is None:
                continue
            recall = self._recall(planned, self.known_of(planned))
            for register, instruction in enumerate(planned.task.program.instructions):
                if recall is not None and isinstance(instruction, Apply) and instruction.step == step:
                    digest.update(recall.of_round(register, number))
        self._identity = digest.digest()
        found: Mapping[str, Any] | None = self._cache.get(self._identity)
        return found

    def known_of(self, planned: PlannedTask) -> Known:
        """What a task knows before its first pass."""
        known = Known()
        for register, instruction in enumerate(planned.task.program.instructions if self.sums else ()):
            if isinstance(instruction, Apply) and instruction.step in self.sums:
                known.sums[register] = dict(self.sums[instruction.step])
        return known


def _across(planned: PlannedTask) -> Iterator[Sweep]:
    return (one for one in planned.passes.passes if isinstance(one, Sweep) and one.across)
