"""What is computed for a key: a straight line of instructions over registers, shared by all keys of one kind."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from remelt.core.dtype import DType
from remelt.recipe.method import Method, Reduction


@dataclass(frozen=True, slots=True)
class Register:
    """The result of an earlier instruction."""

    index: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """Several registers by key, for methods that need several keys."""

    items: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """A number that differs from key to key: its index among the task's numbers."""

    index: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that is the same for every key."""

    value: Any


@dataclass(frozen=True, slots=True)
class Listed:
    """Numbers of which some differ from key to key."""

    items: tuple[Slot | Constant, ...]


Argument = Register | Bundle | Slot | Constant | Listed


@dataclass(frozen=True, slots=True)
class Load:
    """A tensor of an input: of the task's own key, or of a key named here."""

    input: int
    key: str | None


@dataclass(frozen=True, slots=True)
class Apply:
    """A method applied to registers. ``key`` and ``call`` identify it to counter-based randomness and to messages."""

    method: Method[..., Any]
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]
    operands: tuple[int, ...]
    key: str | None
    cast: DType | None = None
    step: int = -1
    """The step of the recipe that it is, the same for all keys."""
    occurrence: int = 0
    """Which of the recipe's calls it is that draw with the same method and seed."""

    @property
    def reductions(self) -> Sequence[Reduction]:
        """The rounds of reductions that this call needs."""
        declaration = self.method.declaration
        known: dict[str, Any] = {}
        for name, argument in self.kwargs:
            if isinstance(argument, Constant):
                known[name] = argument.value
            elif isinstance(argument, Listed):
                known[name] = tuple(item.value if isinstance(item, Constant) else None for item in argument.items)
        return declaration.rounds(known)


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of what a method of cut ``model`` returned."""

    register: int
    key: str


Instruction = Load | Apply | Item


@dataclass(frozen=True, slots=True)
class Output:
    """What becomes of a register: a tensor of a result. ``dtype`` is a type, or the input whose own type it keeps."""

    root: int
    key: str | None
    register: int
    dtype: DType | int
    source_key: str | None


@dataclass(frozen=True)
class Program:
    """Instructions in order, the results, and each register's shape (None: the shape of the task's key)."""

    instructions: tuple[Instruction, ...]
    outputs: tuple[Output, ...]
    shapes: tuple[tuple[int, ...] | None, ...]

    @functools.cached_property
    def loads(self) -> list[Load]:
        """What is read, each tensor once."""
        return [instruction for instruction in self.instructions if isinstance(instruction, Load)]

    def applies(self, step: int) -> bool:
        """Whether a step of the recipe is computed."""
        return any(isinstance(one, Apply) and one.step == step for one in self.instructions)

    def reached(self, registers: Sequence[int]) -> set[int]:
        """The registers that are computed from some of those, and those themselves."""
        found = set(registers)
        for register in range(len(self.instructions)):
            if not found.isdisjoint(self.operands(register)):
                found.add(register)
        return found

    def shows_all(self) -> bool:
        """Whether NaN or infinity in any element that is read always shows in an element of a result.

        So it does where every tensor that is read reaches a result through methods that spread them.
        """
        shows = {output.register for output in self.outputs}
        for register in range(len(self.instructions) - 1, -1, -1):
            instruction = self.instructions[register]
            if register in shows and isinstance(instruction, Apply) and instruction.method.declaration.spreads:
                shows.update(instruction.operands)
        return all(register in shows for register, found in enumerate(self.instructions) if isinstance(found, Load))

    @functools.cached_property
    def mended(self) -> frozenset[Load]:
        """What is read only by way of methods that deal with NaN and infinities themselves."""
        refused = {output.register for output in self.outputs}
        for register in range(len(self.instructions) - 1, -1, -1):
            instruction, operands = self.instructions[register], self.operands(register)
            mends = isinstance(instruction, Apply) and instruction.method.declaration.mends
            refused.update(operands[1:] if mends else operands if register in refused else ())
        return frozenset(
            one for register, one in enumerate(self.instructions) if isinstance(one, Load) and register not in refused
        )

    def operands(self, register: int) -> tuple[int, ...]:
        """The registers that one instruction needs."""
        instruction = self.instructions[register]
        if isinstance(instruction, Apply):
            return instruction.operands
        return (instruction.register,) if isinstance(instruction, Item) else ()


def compact(
    instructions: Sequence[Instruction], outputs: Sequence[Output], shapes: Sequence[tuple[int, ...] | None]
) -> Program:
    """The program without instructions that no output needs, registers renumbered."""
    needed = [False] * len(instructions)
    for output in outputs:
        needed[output.register] = True
    for index in range(len(instructions) - 1, -1, -1):
        if needed[index]:
            instruction = instructions[index]
            for operand in instruction.operands if isinstance(instruction, Apply) else ():
                needed[operand] = True
            if isinstance(instruction, Item):
                needed[instruction.register] = True
    if all(needed):
        return Program(tuple(instructions), tuple(outputs), tuple(shapes))
    moved = [-1] * len(instructions)
    kept: list[Instruction] = []
    for index, instruction in enumerate(instructions):
        if needed[index]:
            moved[index] = len(kept)
            kept.append(_renumbered(instruction, moved))
    return Program(
        tuple(kept),
        tuple(Output(o.root, o.key, moved[o.register], o.dtype, o.source_key) for o in outputs),
        tuple(shape for shape, keep in zip(shapes, needed, strict=True) if keep),
    )


def _renumbered(instruction: Instruction, moved: Sequence[int]) -> Instruction:
    if isinstance(instruction, Item):
        return Item(moved[instruction.register], instruction.key)
    if isinstance(instruction, Load):
        return instruction
    args = tuple(_argument(argument, moved) for argument in instruction.args)
    kwargs = tuple((name, _argument(argument, moved)) for name, argument in instruction.kwargs)
    operands = tuple(moved[operand] for operand in instruction.operands)
    return replace(instruction, args=args, kwargs=kwargs, operands=operands)


def _argument(argument: Argument, moved: Sequence[int]) -> Argument:
    if isinstance(argument, Register):
        return Register(moved[argument.index])
    if isinstance(argument, Bundle):
        return Bundle(tuple((key, moved[register]) for key, register in argument.items))
    return argument
