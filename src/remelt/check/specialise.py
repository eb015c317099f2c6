"""The recipe for one kind of key: which steps have a value there, and the program that computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from remelt.archs.facts import KeyFacts
from remelt.check.arguments import finest, floating_type, refuse_by_key
from remelt.check.bound import BoundGraph, Step
from remelt.check.inputs import Input
from remelt.check.kinds import Describe, NumberSlot, Place, Shape, Stranded
from remelt.check.program import (
    Apply,
    Argument,
    Bundle,
    Constant,
    Instruction,
    Item,
    Listed,
    Load,
    Output,
    Program,
    Register,
    Slot,
    compact,
)
from remelt.check.states import OWN, State, joined, sole_operand
from remelt.core.dtype import DType
from remelt.methods import METHODS
from remelt.recipe.blocks import BlockWeights
from remelt.recipe.method import Group


class Specialiser:
    """Walks the bound steps for one kind of key at a time."""

    def __init__(
        self,
        graph: BoundGraph,
        steps: Sequence[int],
        roots: Sequence[int],
        inputs: Mapping[int, Input],
        masses: Sequence[float | None],
    ) -> None:
        self.graph, self.steps, self.roots, self.inputs, self.masses = graph, steps, roots, inputs, masses
        self.slots: list[NumberSlot] = []
        self.slot_of: dict[tuple[int, str, int], int] = {}
        """The slot of an argument of a step, and of each number of a list."""
        self.selecting: list[int] = []
        self.asks_shapes = False
        self.casts: dict[int, DType] = {}
        for index in steps:
            self._prepare(index, graph.steps[index])

    def _prepare(self, index: int, step: Step) -> None:
        if step.method is None:
            return
        declaration = step.method.declaration
        if declaration.selects is not None:
            self.selecting.append(index)
        self.asks_shapes |= declaration.shape is not None or declaration.finer is not None
        for name, value in step.values:
            for place, item in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(item, BlockWeights):
                    default = next(p.default for p in step.method.parameters if p.name == name)
                    self.slot_of[index, name, place] = len(self.slots)
                    listed = place if isinstance(value, tuple) else None
                    self.slots.append(NumberSlot(step, name, listed, item, default))
            if name == declaration.casts and isinstance(value, str):
                self.casts[index] = floating_type(value, step)

    @property
    def asks_facts(self) -> bool:
        """Whether any step treats keys differently for what they are called."""
        return bool(self.slots or self.selecting)

    def selected(self, facts: KeyFacts | None) -> tuple[bool, ...]:
        """Which of the picking and omitting steps let the key through."""
        return tuple(self.selects(index, facts) for index in self.selecting)

    def selects(self, index: int, facts: KeyFacts | None) -> bool:
        """Whether a picking or omitting step lets the key through."""
        step = self.graph.steps[index]
        assert facts is not None
        assert step.method is not None
        assert step.method.declaration.selects is not None
        return step.method.declaration.selects(facts, dict(step.values))

    def shortcuts(self, numbers: Sequence[float]) -> tuple[float | None, ...]:
        """Which of the numbers make operands idle: the values at which they do, None elsewhere."""
        found: list[float | None] = []
        for slot, number in zip(self.slots, numbers, strict=True):
            assert slot.step.method is not None
            shortcuts = slot.step.method.declaration.shortcuts
            hit = any(one.parameter == slot.name and one.value == number for one in shortcuts)
            found.append(number if hit else None)
        return tuple(found)

    def copy_of(self, index: int, root: int) -> Program:
        """The program that takes an input's tensor over as it is."""
        return Program((Load(index, None),), (Output(root, None, 0, index, None),), (None,))

    def specialise(
        self,
        keys: Sequence[str | None],
        present: set[Place],
        describe: Describe,
        shapes: Mapping[Place, Shape] | None,
        groups: Mapping[int, Mapping[str, Group]] | None = None,
        integers: Mapping[Place, str] | None = None,
        only: int | None = None,
    ) -> tuple[Program | None, list[Stranded]]:
        """The program of the results at these keys, and the results that cannot be computed there.

        ``keys`` is ``(None,)`` for a key left open; ``describe`` tells its kind; ``groups`` gives, for each step of cut
        ``model``, the group of each key; ``integers`` names the types of inputs that are no floating-point numbers;
        ``only`` asks for one step's value instead of the results'.
        """
        walk = _Walk(self, present, describe, shapes, groups or {}, integers or {})
        roots = [only] if only is not None else list(self.roots)
        needed = walk.needed(roots, keys)
        for index in self.steps:
            for key in needed.get(index, ()):
                walk.states[index, key] = walk.visit(index, key)
        outputs: list[Output] = []
        stranded: list[Stranded] = []
        for position, root in enumerate(roots):
            for key in keys:
                state = walk.states[root, key]
                if state.register is not None:
                    dtype = DType.F32 if state.dtype == OWN else state.dtype
                    outputs.append(Output(position, key, state.register, dtype, state.source_key))
                elif state.lacking or state.shapes:
                    stranded.append(Stranded(position, key, state.lacking, state.shapes))
        program = compact(walk.instructions, outputs, walk.shapes) if outputs else None
        return program, stranded


class _Walk:
    """One walk over the steps: states by step and key, instructions as they arise."""

    def __init__(
        self,
        owner: Specialiser,
        present: set[Place],
        describe: Describe,
        given: Mapping[Place, Shape] | None,
        groups: Mapping[int, Mapping[str, Group]],
        integers: Mapping[Place, str],
    ) -> None:
        self.owner, self.present, self.describe, self.given, self.groups = owner, present, describe, given, groups
        self.integers = integers
        self.states: dict[Place, State] = {}
        self.instructions: list[Instruction] = []
        self.shapes: list[Shape | None] = []
        self.loaded: dict[Place, int] = {}
        self.computed: dict[tuple[int, tuple[str, ...]], int] = {}

    def needed(self, roots: Sequence[int], keys: Sequence[str | None]) -> dict[int, Sequence[str | None]]:
        """Which keys of each step the results need; more than their own only through methods of cut ``model``."""
        if not self.groups:
            return dict.fromkeys(self.owner.steps, keys)
        wanted: dict[int, dict[str | None, None]] = {root: dict.fromkeys(keys) for root in roots}
        for index in reversed(self.owner.steps):
            here = wanted.get(index)
            if not here:
                continue
            by_key = self.groups.get(index, {})
            for key in list(here):
                group = by_key.get(key) if key is not None else None
                below = group.inputs if group is not None else (key,)
                if group is not None:
                    here.update(dict.fromkeys(group.outputs))
                for _, operand in self.owner.graph.steps[index].operands:
                    wanted.setdefault(operand, {}).update(dict.fromkeys(below))
        return {index: list(found) for index, found in wanted.items()}

    def emit(self, instruction: Instruction, shape: Shape | None) -> int:
        self.instructions.append(instruction)
        self.shapes.append(shape)
        return len(self.instructions) - 1

    def visit(self, index: int, key: str | None) -> State:
        step = self.owner.graph.steps[index]
        if step.input is not None:
            given = self.owner.inputs[step.input]
            if (step.input, key) not in self.present:
                return State(None, zero=True) if given.adapter is not None else State(None, lacking=(given.label,))
            place = (step.input, key)
            if place not in self.loaded:
                shape = None if self.given is None else self.given[place]
                self.loaded[place] = self.emit(Load(step.input, key), shape)
            own = OWN if given.adapter is not None else step.input
            return State(self.loaded[place], own, key, integral=place in self.integers)
        assert step.method is not None
        if index in self.groups and key is not None and key in self.groups[index]:
            return self.visit_group(index, step, self.groups[index][key], key)
        operands = [self.states[operand, key] for _, operand in step.operands]
        if index in self.owner.selecting and not self.owner.selects(index, self.describe(key).facts):
            return State(None, lacking=())
        declaration = step.method.declaration
        if declaration.first_present or declaration.cut == "model":
            return self.first_present(operands)
        if self.describe(key).copied:
            tensors = [s for s, (_, o) in zip(operands, step.operands, strict=True) if self.owner.masses[o] is not None]
            return self.first_present(tensors)
        if any(state.zero for state in operands):
            found = self.beside_zeros(index, step, operands)
            if isinstance(found, State):
                return found
            operands = found
        if self.given is not None and (clash := self.clash(step, operands, key)) is not None:
            return clash
        if self.integers and (whole := self.integers_only(step, operands)) is not None:
            return whole
        if self.is_unchanged(step, operands):
            return operands[0]
        idle = self.shortcut(index, step, operands, key)
        if idle is not None:
            return idle
        if any(state.register is None for state in operands):
            return self.absent(step, operands)
        return self.apply(index, step, operands, key)

    def beside_zeros(self, index: int, step: Step, operands: Sequence[State]) -> State | list[State]:
        """What a call is where some operands are zero: one of the others, zero, or a call of operands with zeros."""
        assert step.method is not None
        masks = {operand for _, operand in step.operands if self.owner.masses[operand] is None}
        found = sole_operand(step, operands, masks)
        if found is not None:
            return found
        first = next((state.register for state in operands if state.register is not None), None)
        if first is None:
            return self.absent(step, operands)
        nothing = Apply(METHODS["scale"], (Register(first), Constant(0.0)), (), (first,), None, step=index)
        zeros = State(self.emit(nothing, self.shapes[first]), OWN)
        return [zeros if state.zero else state for state in operands]

    def first_present(self, operands: Sequence[State]) -> State:
        for state in operands:
            if state.register is not None or state.shapes is not None:
                return state
        return State(None, lacking=joined(operands), zero=any(state.zero for state in operands))

    def clash(self, step: Step, operands: Sequence[State], key: str | None) -> State | None:
        """What does not fit among the operands that are there: shapes, or integers among floating-point numbers."""
        assert step.method is not None
        broken = next((state for state in operands if state.shapes is not None), None)
        if broken is not None:
            return broken
        registers = [state.register for state in operands if state.register is not None]
        known = [shape for register in registers if (shape := self.shapes[register]) is not None]
        comparable = step.method.declaration.shape is None and len(known) == len(registers)
        if comparable and any(shape != known[0] for shape in known):
            return State(None, shapes=self.mismatch(step, registers, known, key))
        tensors = self.tensors(step, operands)
        odd = next((state for state in tensors if state.integral), None)
        plain = next((state for state in tensors if not state.integral), None)
        if odd is None or plain is None:
            return None
        labels = [self.label(state.register or 0) for state in (odd, plain)]
        dtype = self.integers[odd.dtype, key]  # type: ignore[index]
        message = (
            f"{{key}} is {dtype}, but holds floating-point numbers in {labels[1]}: {step.method.name} mixes no integers"
        )
        return State(None, shapes=(labels[0], message))

    def tensors(self, step: Step, operands: Sequence[State]) -> list[State]:
        """The operands that are there, without masks."""
        pairs = zip(operands, step.operands, strict=True)
        return [s for s, (_, o) in pairs if self.owner.masses[o] is not None and s.register is not None]

    def integers_only(self, step: Step, operands: Sequence[State]) -> State | None:
        """Integers are copied, never averaged: the first operand that there is, where all are."""
        tensors = self.tensors(step, operands)
        return tensors[0] if tensors and all(state.integral for state in tensors) else None

    def absent(self, step: Step, operands: Sequence[State]) -> State:
        """Some operand has no such key: the call has none either, and says whose fault that is."""
        shapes = next((state.shapes for state in operands if state.shapes is not None), None)
        lacking = joined(operands)
        if not lacking and shapes is None and any(state.register is not None for state in operands):
            place = f" (line {step.span.line})" if step.span is not None else ""
            lacking = (f"an operand of {step.method.name}{place}",)  # type: ignore[union-attr]
        return State(None, lacking=lacking, shapes=shapes)

    def is_unchanged(self, step: Step, operands: Sequence[State]) -> bool:
        """Whether the shapes say that the first operand is the result."""
        assert step.method is not None
        rule = step.method.declaration.unchanged
        if rule is None or self.given is None or any(state.register is None for state in operands):
            return False
        shapes = [self.shapes[state.register] for state in operands if state.register is not None]
        known = [shape for shape in shapes if shape is not None]
        return len(known) == len(shapes) and rule(known)

    def shortcut(self, index: int, step: Step, operands: Sequence[State], key: str | None) -> State | None:
        assert step.method is not None
        if not step.method.declaration.shortcuts:
            return None
        values = dict(step.values)
        for shortcut in step.method.declaration.shortcuts:
            slot = self.owner.slot_of.get((index, shortcut.parameter, 0))
            number = values.get(shortcut.parameter) if slot is None else self.describe(key).numbers[slot]
            if number == shortcut.value:
                for (name, _), state in zip(step.operands, operands, strict=True):
                    if name == shortcut.result:
                        return self.as_first(state, operands)
        return None

    @staticmethod
    def as_first(state: State, operands: Sequence[State]) -> State:
        """An operand in the first one's element type: what a result is stored in never depends on a number."""
        first = next((one for one in operands if one.dtype != OWN), operands[0])
        if state.register is None or first.register is None:
            return state
        return state._replace(dtype=first.dtype, source_key=first.source_key)

    def apply(self, index: int, step: Step, operands: Sequence[State], key: str | None) -> State:
        assert step.method is not None
        registers = [state.register for state in operands if state.register is not None]
        shapes = [self.shapes[register] for register in registers]
        declaration = step.method.declaration
        shape = shapes[0]
        if self.given is not None:
            known = [known for known in shapes if known is not None]
            if declaration.shape is not None:
                shape = declaration.shape(known, dict(step.values))
        arguments, keywords = self.arguments(index, step, registers, key)
        cast = self.owner.casts.get(index)
        own_key = key if self.groups else None
        method = finest(step, [known for known in shapes if known is not None])
        applied = Apply(method, arguments, keywords, tuple(registers), own_key, cast, index, step.occurrence)
        refuse_by_key(step, applied)
        first = next((state for state in operands if state.dtype != OWN), operands[0])
        dtype = cast if cast is not None else first.dtype
        return State(self.emit(applied, shape), dtype, first.source_key)

    def arguments(
        self, index: int, step: Step, registers: Sequence[int], key: str | None
    ) -> tuple[tuple[Argument, ...], tuple[tuple[str, Argument], ...]]:
        """The function's arguments, in its order: operands in registers, values as constants or slots."""
        assert step.method is not None
        by_name: dict[str, list[Argument]] = {}
        for (name, _), register in zip(step.operands, registers, strict=True):
            by_name.setdefault(name, []).append(Register(register))
        for name, value in step.values:
            by_name.setdefault(name, []).append(self.plain(index, name, value, key))
        args: list[Argument] = []
        kwargs: list[tuple[str, Argument]] = []
        for parameter in step.method.parameters:
            if parameter.keyword_only:
                kwargs += [(parameter.name, argument) for argument in by_name.get(parameter.name, ())]
            else:
                args += by_name.get(parameter.name, ())
        return tuple(args), tuple(kwargs)

    def plain(self, index: int, name: str, value: Any, key: str | None) -> Argument:
        """An argument that is no tensor: a constant, where no number of it differs by key."""
        if not isinstance(value, tuple):
            return self.number(index, name, 0, value, key)
        items = tuple(self.number(index, name, place, item, key) for place, item in enumerate(value))
        constants = tuple(item.value for item in items if isinstance(item, Constant))
        return Constant(constants) if len(constants) == len(items) else Listed(items)

    def number(self, index: int, name: str, place: int, value: Any, key: str | None) -> Slot | Constant:
        """A value as it is; a number that differs by key is open while the key is open, else known."""
        slot = self.owner.slot_of.get((index, name, place))
        if slot is None:
            return Constant(value)
        return Slot(slot) if key is None else Constant(self.describe(key).numbers[slot])

    def mismatch(
        self, step: Step, registers: Sequence[int], shapes: Sequence[Shape], key: str | None
    ) -> tuple[str, str]:
        """Which input's tensor has another shape than the first operand's."""
        odd = next(position for position, shape in enumerate(shapes) if shape != shapes[0])
        labels = [self.label(register) for register in registers]
        assert step.method is not None
        message = (
            f"{{key}} is {list(shapes[odd])}, but {list(shapes[0])} in {labels[0]}: "
            f"{step.method.name} needs tensors of one shape"
        )
        return labels[odd], message

    def label(self, register: int) -> str:
        instruction = self.instructions[register]
        while isinstance(instruction, Apply):
            instruction = self.instructions[instruction.operands[0]]
        if isinstance(instruction, Load):
            return self.owner.inputs[instruction.input].label
        return "a computed tensor"

    def visit_group(self, index: int, step: Step, group: Group, key: str) -> State:
        """A method of cut ``model``: called once for its group, each output an item of what it returns."""
        if key not in group.outputs:
            return self.first_present([self.states[operand, key] for _, operand in step.operands])
        assert step.method is not None
        operands = {(o, k): self.states[o, k] for _, o in step.operands for k in group.inputs}
        if any(state.register is None for state in operands.values()):
            return self.absent(step, list(operands.values()))
        first = step.operands[0][1]
        place = (index, group.outputs)
        if place not in self.computed:
            bundles = [Bundle(tuple((k, operands[o, k].register) for k in group.inputs)) for _, o in step.operands]  # type: ignore[misc]
            flat = tuple(register for bundle in bundles for _, register in bundle.items)
            named = group.outputs[0]  # whichever key comes first in a file, the group is called by one name
            _, keywords = self.arguments(index, step, [0] * len(step.operands), named)
            plain = tuple((name, argument) for name, argument in keywords if not isinstance(argument, Register))
            applied = Apply(step.method, tuple(bundles), plain, flat, named, occurrence=step.occurrence)
            self.computed[place] = self.emit(applied, None)
        state = self.states[first, key]
        item = self.emit(Item(self.computed[place], key), self.shapes[state.register or 0])
        return State(item, step.method.declaration.stores or state.dtype, state.source_key)
