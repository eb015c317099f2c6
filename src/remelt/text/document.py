"""What a recipe's text says beyond its graph: the names of its steps and the comments before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from remelt.recipe.node import Literal, Node


@dataclass(slots=True)
class Step:
    """A statement that gives a value a name: what it is, where it stands, whether a later one uses it.

    ``node`` is what it means in the graph, None for a number or text that no call takes as it is.
    """

    name: str
    line: int
    item: Node | Literal
    node: Node | None
    comments: tuple[str, ...] = ()
    size: int = 0
    used: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A recipe as a person wrote it: the graph, its steps in their order, and the comments on lines of their own.

    ``heading`` stood before the version, ``closing`` before the result, ``trailing`` after it.
    """

    result: Node
    steps: tuple[Step, ...] = ()
    heading: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()
    trailing: tuple[str, ...] = ()
    grammar: str = "version 1"
    """What it is written in."""

    def with_nodes(self, new: Mapping[int, Node]) -> Document:
        """The same with other nodes, by the identity of those that they stand for."""
        steps = tuple(
            one if one.node is None else replace(one, node=new.get(id(one.node), one.node)) for one in self.steps
        )
        return replace(self, result=new.get(id(self.result), self.result), steps=steps)

    @property
    def names(self) -> Mapping[int, str]:
        """The name of each step's node, by the node's identity; the first where it was given several."""
        found: dict[int, str] = {}
        for step in self.steps:
            if step.node is not None:
                found.setdefault(id(step.node), step.name)
        return found

    @property
    def comments(self) -> Mapping[int, tuple[str, ...]]:
        """The comments before each step, by the identity of its node."""
        found: dict[int, tuple[str, ...]] = {}
        for step in self.steps:
            if step.node is not None and step.comments:
                found[id(step.node)] = found.get(id(step.node), ()) + step.comments
        return found

    @property
    def unused(self) -> tuple[Step, ...]:
        """The steps whose names no later statement uses: they are no part of the graph."""
        return tuple(step for step in self.steps if not step.used)
