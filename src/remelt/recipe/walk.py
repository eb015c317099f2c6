"""The only traversals of a recipe: an order, a fold, a rewrite. All are iterative and visit each node once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from remelt.recipe.node import Node

R = TypeVar("R")


def topological(*roots: Node) -> list[Node]:
    """Every node that the roots need, each once, after the nodes that it is computed from.

    >>> from remelt.recipe.node import Model
    >>> a = Model("a")
    >>> [type(node).__name__ for node in topological((a - a) * 0.5)]
    ['Model', 'Call', 'Value', 'Call']
    """
    order: list[Node] = []
    seen: set[int] = set()
    pending: list[Node | None] = list(reversed(roots))
    waiting: list[Node] = []
    while pending:
        node = pending.pop()
        if node is None:  # all that the last waiting node needs is in order
            order.append(waiting.pop())
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        children = node.children
        if not children:
            order.append(node)
            continue
        waiting.append(node)
        pending.append(None)
        pending += [child for child in reversed(children) if id(child) not in seen]
    return order


def fold(root: Node, visit: Callable[[Node, Sequence[R]], R]) -> R:
    """One value for the whole recipe, from each node's own and its children's values.

    >>> from remelt.recipe.node import Model
    >>> fold(Model("a") - Model("b"), lambda node, below: 1 + sum(below))
    3
    """
    values: dict[int, R] = {}
    for node in topological(root):
        values[id(node)] = visit(node, [values[id(child)] for child in node.children])
    return values[id(root)]


def rewrite(root: Node, replace: Callable[[Node], Node]) -> Node:
    """A new recipe in which ``replace`` was asked for each node, its children already replaced.

    Nodes that ``replace`` returns as they are, over children that stayed, are shared with the old recipe.
    """
    return rewritten(root, replace)[id(root)]


def rewritten(root: Node, replace: Callable[[Node], Node]) -> dict[int, Node]:
    """What `rewrite` makes of every node, by the identity of the old one."""
    replaced: dict[int, Node] = {}
    for node in topological(root):
        current, below = node, node.children
        if below:
            children = [replaced[id(child)] for child in below]
            if any(map(operator.is_not, children, below)):
                current = node.with_children(children)
        replaced[id(node)] = replace(current)
    return replaced
