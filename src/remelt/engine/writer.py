"""What is written down while a method is traced: operations and numbers, each only once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from remelt.core.dtype import DType
from remelt.engine.language import Kind, Number, Operand, Operation, Scalar


class Untraceable(Exception):
    """A function does something that the language does not say; it is run as it is, tile by tile."""


class Writer:
    """The operations and numbers written so far; what was written before is found again."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.scalars: list[Scalar] = []
        self._operations: dict[Operation, int] = {}
        self._scalars: dict[tuple[Scalar, float], int] = {}

    def operation(
        self,
        name: str,
        operands: Sequence[Operand],
        kind: Kind,
        *,
        truth: bool = False,
        dtype: DType | None = None,
        place: int = 0,
    ) -> int:
        """The index of an operation."""
        wanted = Operation(name, tuple(operands), kind, truth, dtype, place)
        found = self._operations.get(wanted)
        if found is None:
            found = self._operations[wanted] = len(self.operations)
            self.operations.append(wanted)
        return found

    def scalar(self, scalar: Scalar) -> Number:
        """A number, by index."""
        identity = scalar, math.copysign(1.0, scalar.constant)  # the zeros differ
        found = self._scalars.get(identity)
        if found is None:
            found = self._scalars[identity] = len(self.scalars)
            self.scalars.append(scalar)
        return Number(found)

    def constant(self, value: float) -> Number:
        """A number that is known already."""
        return self.scalar(Scalar("constant", constant=float(value)))

    def is_one(self, operand: Operand) -> bool:
        """Whether an operand is the number 1 for every task."""
        return isinstance(operand, Number) and self.scalars[operand.index] == Scalar("constant", constant=1.0)
