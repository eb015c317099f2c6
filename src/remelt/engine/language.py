"""The small language that element methods are traced to: straight lines of primitives over registers and numbers.

A kernel says what one sweep computes for each element, whatever the methods were that asked for it. Executors run it:
torch on tiles, or the native extension on blocks that stay in a core's first cache.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from remelt.core.dtype import DType

Kind = Literal["single", "double"]
"""What a register holds for each element: float32 or float64. A truth is 1 or 0 of the kind that was compared."""

COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
LOGIC = ("logical_and", "logical_or", "logical_xor", "logical_not")
EXACT = (
    *("add", "sub", "mul", "div", "minimum", "maximum", "fma", "lerp"),
    *("neg", "abs", "sign", "select", "convert", "round"),
    *COMPARISONS,
    *LOGIC,
)
"""Primitives that every executor on a CPU computes to the same bits."""
BY_TORCH = ("sqrt", "exp", "log", "sin", "cos", "tan", "tanh", "sigmoid", "atan2", "pow", "acos")
"""Primitives that torch alone computes: a sweep that has one is run by it. Not all its square roots are the nearest."""


@dataclass(frozen=True, slots=True)
class Number:
    """An operand that is the same for all elements, by its index among the kernel's numbers."""

    index: int


Operand = int | Number


@dataclass(frozen=True, slots=True)
class Operation:
    """One primitive: its operands are earlier operations by index, or numbers.

    ``load`` reads the kernel's source number ``place`` from its stored ``dtype``; ``round`` rounds to ``dtype``;
    ``convert`` makes numbers of ``kind``, from numbers of the other or from truths.
    """

    name: str
    operands: tuple[Operand, ...]
    kind: Kind
    truth: bool = False
    dtype: DType | None = None
    place: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """What a ``load`` reads: a register of the program, a tensor of an input or one that is held whole."""

    register: int
    dtype: DType
    held: bool


@dataclass(frozen=True, slots=True)
class Target:
    """Where a result goes: an output of the program by position, or a register that is gathered whole."""

    value: Operand
    dtype: DType
    output: int | None = None
    register: int | None = None


@dataclass(frozen=True, slots=True)
class Partial:
    """A sum over all elements, of a reduction of a register, by name; or a histogram of their magnitudes' bits.

    ``bins`` is how many it has: those of the upper halves of float32's bits, or of the bits of ``ROW`` times ``begin``
    on, one by one, with a last count of the magnitudes below those.
    """

    value: int
    register: int
    name: str
    bins: int = 0
    begin: Number | None = None


@dataclass(frozen=True, slots=True)
class Scalar:
    """How a number comes about for each task: a constant, a slot of the task, a sum, or arithmetic on such."""

    name: str
    operands: tuple[int, ...] = ()
    constant: float = 0.0
    slot: int = 0
    sum_of: tuple[int, str] = (0, "")


@dataclass(frozen=True)
class Kernel:
    """What one sweep computes for each element, in arithmetic of ``kind``."""

    kind: Kind
    operations: tuple[Operation, ...]
    scalars: tuple[Scalar, ...]
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    partials: tuple[Partial, ...]

    @property
    def is_exact(self) -> bool:
        """Whether all of it is arithmetic that every executor computes to the same bits."""
        return all(operation.name in EXACT or operation.name == "load" for operation in self.operations)

    def numbers(self, slots: Sequence[float], sums: Mapping[int, Mapping[str, float]]) -> list[float]:
        """The numbers of one task, in double precision; `ArithmeticError` where they have no value."""
        found: list[float] = []
        for scalar in self.scalars:
            if scalar.name == "constant":
                found.append(scalar.constant)
            elif scalar.name == "slot":
                found.append(float(slots[scalar.slot]))
            elif scalar.name == "sum":
                register, name = scalar.sum_of
                found.append(float(sums[register][name]))
            else:
                found.append(ARITHMETIC[scalar.name](*[found[operand] for operand in scalar.operands]))
        return found


ARITHMETIC: Mapping[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "abs": abs,
    "sqrt": math.sqrt,
}
"""What a method may do with numbers while it is traced."""


def last_uses(kernel: Kernel) -> list[int]:
    """For each operation, the last one that needs it; targets and sums need theirs to the end."""
    last = list(range(len(kernel.operations)))
    for place, operation in enumerate(kernel.operations):
        for operand in operation.operands:
            if isinstance(operand, int):
                last[operand] = place
    end = len(kernel.operations)
    for value in [target.value for target in kernel.targets] + [partial.value for partial in kernel.partials]:
        if isinstance(value, int):
            last[value] = end
    return last


def in_order_of_need(kernel: Kernel) -> Kernel:
    """The kernel without operations that nothing needs, each load right before its first use."""
    order: list[int] = []
    placed: set[int] = set()
    needed = _needed(kernel)
    loads = {place for place, operation in enumerate(kernel.operations) if operation.name == "load"}

    def place_all(operands: Sequence[Operand]) -> None:
        for operand in operands:
            if isinstance(operand, int) and operand in loads and operand not in placed:
                placed.add(operand)
                order.append(operand)

    for place, operation in enumerate(kernel.operations):
        if place in loads or not needed[place]:
            continue
        place_all(operation.operands)
        order.append(place)
    place_all([target.value for target in kernel.targets])
    place_all([partial.value for partial in kernel.partials])
    moved = {old: new for new, old in enumerate(order)}

    def renumbered(operand: Operand) -> Operand:
        return moved[operand] if isinstance(operand, int) else operand

    operations = []
    for old in order:
        found = kernel.operations[old]
        operands = tuple(map(renumbered, found.operands))
        operations.append(replace(found, operands=operands))
    targets = tuple(Target(renumbered(t.value), t.dtype, t.output, t.register) for t in kernel.targets)
    partials = tuple(replace(partial, value=moved[partial.value]) for partial in kernel.partials)
    return Kernel(kernel.kind, tuple(operations), kernel.scalars, kernel.sources, targets, partials)


def _needed(kernel: Kernel) -> list[bool]:
    needed = [False] * len(kernel.operations)
    for value in [target.value for target in kernel.targets] + [partial.value for partial in kernel.partials]:
        if isinstance(value, int):
            needed[value] = True
    for place in range(len(kernel.operations) - 1, -1, -1):
        if needed[place]:
            for operand in kernel.operations[place].operands:
                if isinstance(operand, int):
                    needed[operand] = True
    return needed
