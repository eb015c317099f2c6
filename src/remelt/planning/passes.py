"""How a program is streamed: in passes over tiles, each as soon as what it needs is known.

An `element` method without reductions streams with its operands. One with reductions needs a pass for each round before
its own tiles can be computed. A method that needs whole tensors has its operands gathered first, and is then called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from remelt.check.program import Apply, Item, Load, Program
from remelt.recipe.declaration import Vectors
from remelt.recipe.method import Reduction


@dataclass(frozen=True)
class Sweep:
    """One pass over the tiles of one shape: ``order`` is computed for each tile, then put to use.

    ``reductions`` are pairs of register and round to add up; ``gathers`` are registers to keep whole; ``outputs`` are
    positions among the program's outputs to write. ``frees`` lists, for each instruction of ``order``, the registers
    that are no longer needed after it. ``live`` is the most registers held at a time; ``drops`` are gathered registers
    that no later pass needs. ``sampled`` where it needs to look at some elements only, ``due`` where it is
    counted on that it takes a pass over all. ``rows`` where its tiles are whole rows: what vectors are; ``batched``
    where they are batches of rows. ``across`` where its one round adds up over all tensors, which is done before.
    """

    order: tuple[int, ...]
    reductions: tuple[tuple[int, int], ...]
    gathers: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[tuple[int, ...], ...]
    live: int
    shape: tuple[int, ...] | None
    drops: tuple[int, ...] = ()
    sampled: bool = False
    due: bool = True
    rows: Vectors | Literal[""] = ""
    batched: bool = False
    across: bool = False


@dataclass(frozen=True)
class WholeCall:
    """One call of a method on gathered tensors; ``drops`` are gathered registers not needed after it."""

    register: int
    drops: tuple[int, ...]


Pass = Sweep | WholeCall


@dataclass(frozen=True)
class Schedule:
    """A program's passes in order; ``simple`` where one sweep suffices, which may then be cut anywhere.

    ``divisible`` where all are sweeps over the same elements and hold no tensor whole, so that each may be cut.
    """

    passes: tuple[Pass, ...]
    simple: bool
    divisible: bool


def schedule(program: Program, *, small: bool = False) -> Schedule:
    """The passes of a program.

    Where tensors are ``small``, the results of methods with reductions are kept whole for the passes after them, so
    that a chain of such methods costs a pass each; else every pass computes anew what is below, and holds only tiles.
    """
    return _Scheduler(program, small=small).run()


class _Scheduler:
    def __init__(self, program: Program, *, small: bool) -> None:
        self.program = program
        self.small = small
        self.levels = [0] * len(program.instructions)
        self.summed = self._summed()
        self.whole: set[int] = set()
        for register, instruction in enumerate(program.instructions):
            base = max((self.levels[operand] for operand in program.operands(register)), default=0)
            if isinstance(instruction, Item):
                self.whole.add(register)
            elif isinstance(instruction, Apply) and not self._streams(register, instruction):
                self.whole.add(register)
                base += len(instruction.reductions) + 1
            elif isinstance(instruction, Apply):
                base += len(instruction.reductions)
            self.levels[register] = base

    def _summed(self) -> set[int]:
        """The registers that reductions by element are computed from."""
        found: set[int] = set()
        for register in range(len(self.program.instructions) - 1, -1, -1):
            instruction = self.program.instructions[register]
            sums_up = isinstance(instruction, Apply) and bool(instruction.reductions)
            if register in found or (sums_up and not self._cuts_rows(register)):
                found.update(self.program.operands(register))
        return found

    def _streams(self, register: int, instruction: Apply) -> bool:
        """Whether a method's tiles are computed where they are needed: sums are of chunks, which end within rows."""
        if self._cuts_rows(register):
            return register not in self.summed
        return instruction.method.declaration.cut == "element"

    def run(self) -> Schedule:
        calls: dict[int, list[int]] = {}
        reductions: dict[int, list[tuple[int, int]]] = {}
        outputs: dict[int, list[int]] = {}
        stores: dict[int, list[int]] = {}
        for register, instruction in enumerate(self.program.instructions):
            if not isinstance(instruction, Apply):
                continue
            rounds, level = len(instruction.reductions), self.levels[register]
            if register in self.whole:
                level -= 1
                calls.setdefault(level, []).append(register)
            elif rounds and self.small:
                stores.setdefault(level, []).append(register)
            for number in range(rounds):
                reductions.setdefault(level - rounds + number, []).append((register, number))
        for position, output in enumerate(self.program.outputs):
            outputs.setdefault(self.levels[output.register], []).append(position)
        passes: list[Pass] = []
        gathered: set[int] = set(self.whole)
        for level in range(max([*self.levels, 0]) + 1):
            stored = stores.get(level, []) if level < max(self.levels) else []
            wanted = dict.fromkeys(
                operand
                for register in calls.get(level, ())
                for operand in self.program.operands(register)
                if operand not in gathered
            )
            wanted.update(dict.fromkeys(stored))
            gathered.update(wanted)
            across = [one for one in reductions.get(level, ()) if self._round(*one).across]
            within = [one for one in reductions.get(level, ()) if one not in across]
            for one in across:
                passes.append(replace(self._sweep(self.program.shapes[one[0]], [one], (), ()), across=True))
            passes += self._sweeps(within, list(wanted), outputs.get(level, ()))
            self.whole.update(stored)
            passes += [WholeCall(register, ()) for register in calls.get(level, ())]
        simple = len(passes) == 1 and isinstance(passes[0], Sweep)
        divisible = all(isinstance(one, Sweep) and not one.gathers and one.shape is None for one in passes)
        return Schedule(tuple(self._with_drops(passes)), simple, divisible)

    def _sweeps(
        self, reductions: Iterable[tuple[int, int]], gathers: Iterable[int], outputs: Iterable[int]
    ) -> Sequence[Pass]:
        shapes: dict[tuple[int, ...] | None, tuple[list[tuple[int, int]], list[int], list[int]]] = {}
        for register, number in reductions:
            shapes.setdefault(self.program.shapes[register], ([], [], []))[0].append((register, number))
        for register in gathers:
            shapes.setdefault(self.program.shapes[register], ([], [], []))[1].append(register)
        for position in outputs:
            register = self.program.outputs[position].register
            shapes.setdefault(self.program.shapes[register], ([], [], []))[2].append(position)
        return [one for shape, targets in shapes.items() for one in self._apart(self._sweep(shape, *targets))]

    def _apart(self, sweep: Sweep) -> list[Sweep]:
        """The pass, or two where some of its sums are of chunks of rows, or its tiles are of rows, and others not."""
        others = tuple(one for one in sweep.reductions if not self._cuts_rows(one[0]))
        if not sweep.rows or not others:
            return [sweep]
        rest = [one for one in sweep.reductions if one not in others]
        return [
            self._sweep(sweep.shape, others, (), ()),
            self._sweep(sweep.shape, rest, sweep.gathers, sweep.outputs),
        ]

    def _sweep(
        self,
        shape: tuple[int, ...] | None,
        reductions: Sequence[tuple[int, int]],
        gathers: Sequence[int],
        outputs: Sequence[int],
    ) -> Sweep:
        roots = [operand for register, _ in reductions for operand in self.program.operands(register)]
        roots += gathers
        roots += [self.program.outputs[position].register for position in outputs]
        kept = set(roots)
        order = self._below(roots)
        last: dict[int, int] = {}
        for place, register in enumerate(order):
            if register not in self.whole:
                for operand in self.program.operands(register):
                    last[operand] = place
        frees: list[list[int]] = [[] for _ in order]
        for register, place in last.items():
            if register not in kept:
                frees[place].append(register)
        live = most = 0
        for freed in frees:
            live += 1
            most = max(most, live)
            live -= len(freed)
        rounds = [self._round(register, number) for register, number in reductions]
        only = bool(rounds) and not gathers and not outputs
        rowed = [*(one for one in order if one not in self.whole), *(one for one, _ in reductions)]
        return Sweep(
            tuple(order),
            tuple(reductions),
            tuple(gathers),
            tuple(outputs),
            tuple(map(tuple, frees)),
            most,
            shape,
            sampled=only and all(one.sampled for one in rounds),
            due=not only or any(self._is_due(one) for one in rounds),
            rows=self._rows(rowed),
            batched=any(self._batches(register) for register in rowed),
        )

    def _rows(self, registers: Iterable[int]) -> Vectors | Literal[""]:
        """What vectors are to those of some calls that cut rows; whole rows, where they differ."""
        found: set[Vectors] = {
            one.method.declaration.vectors
            for register in registers
            if self._cuts_rows(register) and isinstance(one := self.program.instructions[register], Apply)
        }
        if len(found) < 2:
            return found.pop() if found else ""
        return "row"  # in which columns, lines and kernels are whole

    def _cuts_rows(self, register: int) -> bool:
        instruction = self.program.instructions[register]
        return isinstance(instruction, Apply) and instruction.method.declaration.cut == "row"

    def _batches(self, register: int) -> bool:
        instruction = self.program.instructions[register]
        return isinstance(instruction, Apply) and instruction.method.declaration.batched

    def _round(self, register: int, number: int) -> Reduction:
        instruction = self.program.instructions[register]
        assert isinstance(instruction, Apply)
        return instruction.reductions[number]

    def _is_due(self, reduction: Reduction) -> bool:
        if reduction.sampled:
            return self.small
        return reduction.due == "always" or reduction.due == ("whole" if self.small else "sample")

    def _below(self, roots: Sequence[int]) -> list[int]:
        """The instructions that tiles of these registers need; whole registers are sliced, not computed."""
        needed: set[int] = set(roots)
        pending = list(needed)
        while pending:
            register = pending.pop()
            if register in self.whole:
                continue
            for operand in self.program.operands(register):
                if operand not in needed:
                    needed.add(operand)
                    pending.append(operand)
        return sorted(needed)

    def _with_drops(self, passes: Sequence[Pass]) -> list[Pass]:
        """Each whole call with the gathered registers that nothing after it needs."""
        used: set[int] = set()
        result: list[Pass] = []
        for one in reversed(passes):
            if isinstance(one, Sweep):
                here = {register for register in one.order if register in self.whole}
                result.append(replace(one, drops=tuple(sorted(here - used - set(one.gathers)))))
                used |= here
                continue
            operands = set(self.program.operands(one.register))
            result.append(WholeCall(one.register, tuple(sorted(operands - used))))
            used |= operands
        return result[::-1]


def reads(program: Program, passes: Schedule) -> list[tuple[Load, int]]:
    """Each load with the number of sweeps that read it, as a rule."""
    return _counted(program, [one for one in passes.passes if isinstance(one, Sweep) and one.due])


def samples(program: Program, passes: Schedule) -> list[tuple[Load, int]]:
    """Each load with the number of sweeps that look at a sample of it."""
    return _counted(program, [one for one in passes.passes if isinstance(one, Sweep) and one.sampled and not one.due])


def _counted(program: Program, sweeps: Iterable[Sweep]) -> list[tuple[Load, int]]:
    counts: dict[int, int] = {}
    for one in sweeps:
        for register in one.order:
            if isinstance(program.instructions[register], Load):
                counts[register] = counts.get(register, 0) + 1
    return [(program.instructions[register], count) for register, count in sorted(counts.items())]  # type: ignore[misc]
