"""What rules for operations share: a tensor on its way through the graph, a call, and the register of rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from remelt.alignment.derivation.labels import UNIT, Dimensions, Expression, Pinned, Uniform, multiplied, pin
from remelt.alignment.derivation.splitting import factored
from remelt.alignment.derivation.tying import joined, settle


@dataclass(frozen=True)
class Traced:
    """A tensor in the graph, as what its dimensions are made of."""

    dimensions: Dimensions
    picks: Expression | None = None
    """Of a tensor of indices: the dimension that its numbers point into."""
    source: str = ""
    """The name of the node that gives it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each dimension."""
        return tuple(one.size for one in self.dimensions)


Result: TypeAlias = "Traced | tuple[Traced, ...] | None"


@dataclass(frozen=True)
class Call:
    """One operation of the graph: its arguments by the names of its schema, and the shapes of what it gives."""

    name: str
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    source: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or a default where the operation has none of that name."""
        return self.arguments.get(name, default)

    def tensor(self, name: str = "self") -> Traced:
        """An argument that is a tensor."""
        found = self.arguments[name]
        assert isinstance(found, Traced), f"{self.name}: {name} is {found!r}"
        return found

    def optional(self, name: str) -> Traced | None:
        """An argument that may be a tensor."""
        found = self.arguments.get(name)
        return found if isinstance(found, Traced) else None

    @property
    def tensors(self) -> tuple[Traced, ...]:
        """All arguments that are tensors, those in lists included."""
        return tuple(tensors_in(self.arguments.values()))

    def pinned(self) -> tuple[Traced, ...]:
        """What it gives, with a meaning to each place."""
        return tuple(Traced(tuple(Pinned(size) for size in shape)) for shape in self.shapes)


Rule: TypeAlias = Callable[[Call], Result]


class Rules(dict[str, Rule]):
    """Rules for operations, by the names of these without their overloads: ``aten::add``."""

    def of(self, *names: str) -> Callable[[Rule], Rule]:
        """Enter a function as the rule for some operations of ATen."""

        def enter(rule: Rule) -> Rule:
            for name in names:
                self[name if "::" in name else f"aten::{name}"] = rule
            return rule

        return enter


def tensors_in(values: Iterable[Any]) -> Iterable[Traced]:
    """All tensors in arguments that may be lists."""
    for value in values:
        if isinstance(value, Traced):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def settled(dimensions: Iterable[Expression], source: Traced | None = None) -> Traced:
    """A tensor with these dimensions, in which nothing depends on what it lacks; ``source`` has the same numbers."""
    found = tuple(dimensions)
    settle(found)
    return Traced(found) if source is None else replace(source, dimensions=found)


def pin_all(tensors: Iterable[Traced]) -> None:
    """Let nothing in some tensors be permuted."""
    for tensor in tensors:
        for dimension in tensor.dimensions:
            pin(dimension)
        if tensor.picks is not None:
            pin(tensor.picks)


def place(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis % rank if rank else 0


def places(axes: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Axes counted from the front; none stands for all."""
    if axes is None or (not isinstance(axes, int) and not axes):
        return tuple(range(rank))
    return tuple(place(axis, rank) for axis in ((axes,) if isinstance(axes, int) else axes))


def without(dimensions: Dimensions, axes: Sequence[int]) -> Dimensions:
    """The dimensions but some."""
    return tuple(one for place, one in enumerate(dimensions) if place not in axes)


def broadcast(expressions: Sequence[Expression]) -> Expression:
    """One dimension of tensors that are computed with place by place."""
    size = max((one.size for one in expressions), default=1)
    found: Expression = Uniform(size)
    for one in expressions:
        if one.size == size:
            found = joined(found, one)
    return found


def aligned(tensors: Sequence[Traced]) -> Dimensions:
    """The dimensions of what is computed place by place from tensors, the last ones aligned."""
    rank = max((len(tensor.dimensions) for tensor in tensors), default=0)
    padded = [(UNIT,) * (rank - len(tensor.dimensions)) + tensor.dimensions for tensor in tensors]
    return tuple(broadcast(column) for column in zip(*padded, strict=True))


def reshaped(dimensions: Dimensions, shape: Sequence[int]) -> Dimensions:
    """Dimensions in another shape with the same places in the same order."""
    if 0 in shape:
        return tuple(Pinned(size) for size in shape)
    rest = [one for one in dimensions if one.size != 1]
    wanted = [size for size in shape if size != 1]
    found: list[Expression] = []
    while rest:
        taken, sizes = [rest.pop(0)], [wanted.pop(0)]
        while (have := math.prod(one.size for one in taken)) != (need := math.prod(sizes)):
            if have < need:
                taken.append(rest.pop(0))
            else:
                sizes.append(wanted.pop(0))
        found += [taken[0]] if len(taken) == len(sizes) == 1 else factored(multiplied(taken), sizes)
    one = iter(found)
    return tuple(UNIT if size == 1 else next(one) for size in shape)
