"""Labels: the index sets of parameters' axes, and what the dimensions of a tensor are made of.

A dimension is a label, stretches one after another (`Sum`), an index set for each index of another (`Product`), or
something that is not permuted: `Pinned` where each place has a meaning, `Uniform` where all places hold the same. A
label is divided as the network divides the axis, into a sum or a product of new ones. Labels that a network reads
together become one (union-find).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import TypeAlias

_NUMBERS = count()

Scope: TypeAlias = "frozenset[Label]"


@dataclass(frozen=True)
class Pinned:
    """Places that mean something outside: batches, positions, pixels, words."""

    size: int


@dataclass(frozen=True)
class Uniform:
    """Places that all hold the same, so that no permutation of them is seen: what was expanded, or filled."""

    size: int


@dataclass(frozen=True)
class Pick:
    """Places that each hold what belongs to one index of ``of``, by a tensor of indices with the name ``source``."""

    size: int
    of: Expression
    source: str


@dataclass(frozen=True)
class Sum:
    """Stretches one after another. Nothing moves from one to another."""

    parts: tuple[Expression, ...]

    @cached_property
    def size(self) -> int:
        """Places of all."""
        return sum(part.size for part in self.parts)

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each part ends."""
        ends, end = [], 0
        for part in self.parts:
            end += part.size
            ends.append(end)
        return tuple(ends)


@dataclass(frozen=True)
class Product:
    """The places of each factor below each place of those before it; the last counts fastest."""

    factors: tuple[Expression, ...]

    @cached_property
    def size(self) -> int:
        """Places of all."""
        return math.prod(factor.size for factor in self.factors)


@dataclass(frozen=True)
class Cases:
    """How a label is divided that differs from one part to another of a sum that it stands below."""

    over: Label
    ends: tuple[int, ...]
    """Where the parts of ``over`` end."""
    parts: tuple[Expression, ...]


@dataclass(eq=False)
class Label:
    """An index set: ``size`` indices that are permuted alike wherever the label stands."""

    size: int
    scopes: list[Scope] = field(default_factory=list)
    """Sets of labels on which its permutation may depend, all at once; none at all: on any."""
    apart: Scope = frozenset()
    """Sums of which it is what belongs to one part: it depends on these no more."""
    fixed: bool = False
    touched: bool = False
    """Whether something was computed with it; parts that are sliced away are not."""
    role: str = ""
    partitions: set[tuple[int, int]] = field(default_factory=set)
    """GroupNorms over it: the size of a group, and how much of the first lies before index 0."""
    parent: Label | None = None
    split: Expression | Cases | None = None
    stretches: dict[tuple[int, int], Label] = field(default_factory=dict)
    """Several neighbouring parts of it that were sliced together, by start and end."""
    number: int = field(default_factory=lambda: next(_NUMBERS))

    @property
    def root(self) -> Label:
        """The label that stands for all that are tied to it."""
        label = self
        while label.parent is not None:
            if label.parent.parent is not None:
                label.parent = label.parent.parent
            label = label.parent
        return label

    def child(self, size: int, *also: Label) -> Label:
        """A part of it, with what is known of the whole, that may depend on some labels besides."""
        scopes = [scope.union(also) for scope in self.scopes]
        return Label(size, scopes, self.apart, self.fixed, self.touched, self.role)


Expression: TypeAlias = Pinned | Uniform | Pick | Sum | Product | Label
Dimensions: TypeAlias = tuple[Expression, ...]

UNIT = Uniform(1)


def added(parts: Iterable[Expression]) -> Expression:
    """Stretches one after another, as plainly as it can be said."""
    found: list[Expression] = []
    for part in parts:
        for one in part.parts if isinstance(part, Sum) else (part,):
            if isinstance(one, Pinned) and found and isinstance(found[-1], Pinned):
                found[-1] = Pinned(found[-1].size + one.size)
            elif one.size:
                found.append(one)
    return found[0] if len(found) == 1 else Sum(tuple(found))


def multiplied(factors: Iterable[Expression]) -> Expression:
    """Factors, outermost first, as plainly as it can be said.

    >>> multiplied([Pinned(2), UNIT, Pinned(3), Uniform(4)])
    Product(factors=(Pinned(size=6), Uniform(size=4)))
    """
    found: list[Expression] = []
    for factor in factors:
        for one in factor.factors if isinstance(factor, Product) else (factor,):
            last = found[-1] if found else None
            if isinstance(one, Pinned) and isinstance(last, Pinned):
                found[-1] = Pinned(last.size * one.size)
            elif isinstance(one, Uniform) and isinstance(last, Uniform):
                found[-1] = Uniform(last.size * one.size)
            elif one.size != 1:
                found.append(one)
    if len(found) > 1:
        return Product(tuple(found))
    return found[0] if found else UNIT


def opened(expression: Expression) -> Expression:
    """What an expression is made of: a label that is divided as its parts; one that is not as its root."""
    while isinstance(expression, Label):
        root = expression.root
        if root.split is None or isinstance(root.split, Cases):
            return root
        expression = root.split
    return expression


def leaves(expression: Expression) -> list[Label]:
    """The undivided labels in it, those of all cases included."""
    return sorted((one for one in mentioned(expression) if one.split is None), key=lambda one: one.number)


def mentioned(expression: Expression) -> set[Label]:
    """All labels in it, divided or not."""
    if isinstance(expression, Label):
        root = expression.root
        split = root.split
        if split is None:
            return {root}
        below = split.parts if isinstance(split, Cases) else (split,)
        return {root}.union(*(mentioned(one) for one in below))
    if isinstance(expression, Sum):
        return set[Label]().union(*(mentioned(part) for part in expression.parts))
    if isinstance(expression, Product):
        return set[Label]().union(*(mentioned(factor) for factor in expression.factors))
    return mentioned(expression.of) if isinstance(expression, Pick) else set()


def present(expression: Expression) -> set[Label]:
    """The labels of which each of its places has an index: on these what stands beside it may depend."""
    if isinstance(expression, Label):
        root = expression.root
        split = root.split
        if split is None:
            return {root}
        if isinstance(split, Cases):
            return {root} | set.intersection(*(present(part) for part in split.parts))
        return {root} | present(split)
    if isinstance(expression, Sum):
        return set.intersection(*(present(part) for part in expression.parts)) if expression.parts else set()
    if isinstance(expression, Product):
        return set[Label]().union(*(present(factor) for factor in expression.factors))
    return present(expression.of) if isinstance(expression, Pick) else set()


def scope_of(label: Label) -> Scope | None:
    """The labels that a label may depend on, of those that stand for others; None: any."""
    root = label.root
    if not root.scopes:
        return None
    found = frozenset.intersection(*(frozenset(_spread(scope)) for scope in root.scopes))
    return found.difference(label.root for label in root.apart)


def may_depend(label: Label, other: Label) -> bool:
    """Whether a label's permutation may differ from one index of another to the next, by what is known so far."""
    scope = scope_of(label)
    return scope is None or other in scope


def _spread(scope: Scope) -> Iterator[Label]:
    """The labels of a scope now, with what became of them; of cases that of each, one of which any tensor has."""
    for label in scope:
        root = label.root
        yield root
        if isinstance(root.split, Cases):
            for part in root.split.parts:
                yield from present(part)
        elif root.split is not None:
            yield from present(root.split)


def pin(expression: Expression) -> None:
    """Let nothing in it be permuted."""
    for label in mentioned(expression):
        label.fixed = True


def touch(dimensions: Iterable[Expression]) -> None:
    """Note that something is computed with them."""
    for dimension in dimensions:
        for label in leaves(dimension):
            label.touched = True


def give_role(expression: Expression, role: str) -> None:
    """Name what the labels in it are for, where they have no name."""
    for label in leaves(expression):
        label.role = label.role or role
