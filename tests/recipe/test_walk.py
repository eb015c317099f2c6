"""Traversals: each node once, in order, at any depth and any width of sharing."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from remelt.recipe.compose import compose, parameters_of
from remelt.recipe.node import Call, Model, Node, Parameter, Value, flatten
from remelt.recipe.walk import fold, rewrite, topological

DEEP, DIAMONDS = 100_000, 1_000


@contextmanager
def seconds(limit: float) -> Iterator[None]:
    begin = time.process_time()
    yield
    assert time.process_time() - begin < limit


@pytest.fixture(scope="module")
def deep() -> Node:
    """A chain of 100,000 calls over a model and a parameter."""
    node: Node = Model("a")
    other = Parameter("b")
    for _ in range(DEEP):
        node = Call("weighted_sum", (node, other))
    return node


@pytest.fixture(scope="module")
def diamonds() -> Node:
    """2 to the power of 1,000 paths over 1,001 nodes."""
    node: Node = Model("a")
    for _ in range(DIAMONDS):
        node = Call("weighted_sum", (node, node))
    return node


def test_the_order_puts_each_node_once_after_what_it_needs() -> None:
    a, b = Model("a"), Model("b")
    shared = a - b
    root = Call("weighted_sum", (shared, a), (("alpha", Value(0.5)), ("c", shared)))
    order = topological(root)
    assert len(order) == len({id(node) for node in order}) == 5
    assert order[:3] == [a, b, shared]
    assert order[-1] is root
    place = {id(node): index for index, node in enumerate(order)}
    assert all(place[id(child)] < place[id(node)] for node in order for child in node.children)


def test_several_roots_share_their_nodes() -> None:
    a, b = Model("a"), Model("b")
    first, second = a - b, b - a
    assert topological(first, second, first) == [a, b, first, second]
    assert topological() == []


def test_a_fold_visits_shared_nodes_once() -> None:
    visited: list[Node] = []

    def visit(node: Node, below: object) -> int:
        visited.append(node)
        return 1

    a = Model("a")
    fold(Call("add", (a, a)), visit)
    assert visited == [a, visited[1]]
    assert len(visited) == 2


def test_a_rewrite_keeps_what_did_not_change() -> None:
    a, b = Model("a"), Model("b")
    kept = a - a
    root = Call("weighted_sum", (kept, b), (("alpha", Value(0.5)),))
    assert rewrite(root, lambda node: node) is root
    changed = rewrite(root, lambda node: Model("c") if node is b else node)
    assert isinstance(changed, Call)
    assert changed is not root
    assert changed.args[0] is kept
    assert repr(changed.args[1]) == "model('c')"
    assert changed.kwargs[0][1] is root.kwargs[0][1]


def test_a_rewrite_asks_for_each_node_after_its_children() -> None:
    asked: list[str] = []

    def ask(node: Node) -> Node:
        asked.append(repr(node))
        return Model("x") if isinstance(node, Model) else node

    rewrite(Call("scale", (Model("a"),), (("alpha", Value(2.0)),)), ask)
    assert asked == ["model('a')", "2.0", "<call scale(1 arguments, alpha)>"]


def test_a_recipe_of_100_000_calls_is_walked_without_recursion(deep: Node) -> None:
    with seconds(60):
        assert len(topological(deep)) == DEEP + 2
        assert fold(deep, lambda node, below: 1 + max(below, default=0)) == DEEP + 1
        assert list(parameters_of(deep)) == ["b"]
        filled = compose(deep, b="m")
        assert parameters_of(filled) == {}
        assert filled.digest() != deep.digest()
        assert repr(deep) == "<call weighted_sum(2 arguments)>"


def test_a_recipe_of_100_000_calls_survives_pickling(deep: Node) -> None:
    with seconds(60):
        assert pickle.loads(pickle.dumps(deep)).digest() == deep.digest()


def test_a_thousand_diamonds_are_a_thousand_nodes(diamonds: Node) -> None:
    with seconds(20):
        assert len(topological(diamonds)) == len(flatten(diamonds)) == DIAMONDS + 1
        assert fold(diamonds, lambda node, below: sum(below) or 1) == 2**DIAMONDS
        renamed = rewrite(diamonds, lambda node: Model("b") if isinstance(node, Model) else node)
        assert len(topological(renamed)) == DIAMONDS + 1
        copy = pickle.loads(pickle.dumps(diamonds))
        assert len(topological(copy)) == DIAMONDS + 1
        assert copy.digest() == diamonds.digest() != renamed.digest()
