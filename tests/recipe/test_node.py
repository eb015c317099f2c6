"""Nodes: operators, what may stand in a recipe, digests, pickles and how nodes are shown."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import remelt as rm
from remelt.errors import RecipeError, Span
from remelt.recipe.node import Call, Model, Node, Parameter, Value, as_node, literal

A, B = rm.model("a"), rm.model("b")


@pytest.mark.parametrize(
    ("made", "method", "shown"),
    [
        (A + B, "add", ["model('a')", "model('b')"]),
        (A - B, "subtract", ["model('a')", "model('b')"]),
        (A * B, "multiply", ["model('a')", "model('b')"]),
        (A | B, "fallback", ["model('a')", "model('b')"]),
        ("x" + A, "add", ["model('x')", "model('a')"]),
        (A - "x", "subtract", ["model('a')", "model('x')"]),
        (Path("f") / "x" - A, "subtract", ["model('f/x')", "model('a')"]),
        ("x" | A, "fallback", ["model('x')", "model('a')"]),
        (0.5 * A, "scale", ["model('a')", "0.5"]),
        (A * 2, "scale", ["model('a')", "2"]),
        (-A, "scale", ["model('a')", "-1.0"]),
        (rm.blocks(M00=0.5) * A, "scale", ["model('a')", "blocks(M00=0.5)"]),
        (A * (rm.blocks(M00=0.5) | 1.0), "scale", ["model('a')", "blocks(M00=0.5) | 1.0"]),
        (rm.search(0, 1) * A, "scale", ["model('a')", "search(0.0, 1.0)"]),
    ],
)
def test_operators_are_calls(made: Call, method: str, shown: list[str]) -> None:
    assert made.method == method
    assert [repr(child) for child in made.children] == shown


def test_nodes_cannot_be_changed_and_are_told_apart_by_identity() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        A.name = "c"  # type: ignore[misc]
    assert Model("a") != Model("a")
    assert len({A, A, B}) == 2


def test_a_recipe_has_no_truth_value() -> None:
    with pytest.raises(RecipeError, match="a recipe has no truth value: it is not computed until it is merged"):
        bool(A - B)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "a recipe's numbers are finite, but got nan"),
        (-math.inf, "a recipe's numbers are finite, but got -inf"),
        ((0.5, [math.inf]), "a recipe's numbers are finite, but got inf"),
        (b"x", "a recipe holds numbers, texts, block weights and models, but got bytes"),
        ({"w": 1}, r"but got dict\nhint: wrap tensors in memory with model\(\{...\}\)"),
        (torch.ones(2), "but got Tensor"),
    ],
)
def test_what_no_recipe_can_hold_is_refused(value: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        literal(value)


def test_lists_become_tuples() -> None:
    assert literal([1, ["x", None], True]) == (1, ("x", None), True)


def test_operands_are_what_people_write() -> None:
    assert as_node(A) is A
    assert isinstance(as_node("a"), Model)
    assert repr(as_node(Path("folder") / "a.safetensors")) == "model('folder/a.safetensors')"
    assert isinstance(as_node(0.5), Value)


def test_a_mapping_is_a_model_in_memory() -> None:
    tensors = {"w": torch.ones(2)}
    held = rm.model(tensors, name="ones")
    assert held.tensors is tensors
    assert repr(held) == "model('ones')"
    assert repr(rm.model(tensors)) == "model('memory')"
    call = rm.weighted_sum(tensors, "b")  # type: ignore[arg-type]
    assert isinstance(call.args[0], Model)
    assert call.args[0].tensors is tensors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rm.model(""), "a model's name is a path or a name in a models folder, but got ''"),
        (lambda: rm.model("a\0b"), "a model's name is a path or a name"),
        (lambda: rm.model("a", space="weights"), "a model's space is one of weight, delta, param, but got 'weights'"),
        (lambda: rm.parameter("a b"), "a parameter's name is a word, or words joined by dots, but got 'a b'"),
        (lambda: rm.parameter("a..b"), "a parameter's name is a word"),
        (lambda: rm.parameter(""), "a parameter's name is a word"),
        (lambda: rm.parameter(3), "a parameter's name is a word, or words joined by dots, but got 3"),
        (lambda: rm.parameter("a", space="mask"), "a parameter's space is one of weight, delta, param"),
        (lambda: rm.search(1, 0), "search needs two finite numbers, low below high"),
    ],
)
def test_what_no_model_or_parameter_can_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


SPAN = Span("x.mecha", "a - b", 1, 1)
DIFFERENT = [
    rm.model("a"),
    rm.model("a", sha256="0" * 64),
    rm.model("a", space="delta"),
    rm.model("a", arch="sd1"),
    rm.parameter("a"),
    Value("a"),
    Value(1),
    Value(1.0),
    Value(True),
    Value(None),
    Value(rm.blocks(M00=0.5)),
    Value(rm.blocks(M00=0.5) | 0.5),
    Value(rm.components(unet=0.5)),
    Value(rm.search(0, 1)),
    A - B,
    B - A,
    A + B,
    A - A,
    Call("weighted_sum", (A, B)),
    Call("weighted_sum", (A,), (("b", B),)),
    Call("weighted_sum", (A, B), (("alpha", Value(0.5)),)),
    Call("weighted_sum", (A, B), (("alpha", Value(0.25)),)),
    Call("weighted_sum", (A, B, Value(0.5))),
]


def test_digests_tell_different_recipes_apart() -> None:
    assert len({node.digest() for node in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize("node", DIFFERENT, ids=repr)
def test_a_copy_has_the_digest_of_the_original(node: Node) -> None:
    for other in (pickle.loads(pickle.dumps(node)), copy.deepcopy(node), copy.copy(node)):
        assert type(other) is type(node)
        assert other.digest() == node.digest()
        assert repr(other) == repr(node)


def test_a_digest_does_not_depend_on_where_a_recipe_was_written_nor_on_sharing() -> None:
    written = Call("subtract", (Model("a", span=SPAN), Model("b", span=SPAN)), span=SPAN, spans=(("x", SPAN),))
    assert written.digest() == (A - B).digest()
    assert (A - A).digest() == (rm.model("a") - rm.model("a")).digest()


def test_a_digest_never_changes_between_runs() -> None:
    assert (A - B).digest() == GOLDEN


def test_tensors_in_memory_are_told_apart_by_identity_and_pickle_with_their_content() -> None:
    first, second = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    assert rm.model(first).digest() == rm.model(first).digest()
    assert rm.model(first).digest() != rm.model(second).digest()
    kept = pickle.loads(pickle.dumps(rm.model(first) - rm.model(second)))
    assert torch.equal(kept.children[0].tensors["w"], torch.ones(2))


def test_pickling_keeps_what_is_shared_shared() -> None:
    shared = A - B
    kept = pickle.loads(pickle.dumps(shared + shared))
    assert kept.args[0] is kept.args[1]


def test_calls_are_shown_in_one_line_whatever_their_depth() -> None:
    assert repr(rm.weighted_sum(A, B, alpha=0.3)) == "<call weighted_sum(2 arguments, alpha)>"
    assert repr(Call("f", (), (("x", A),))) == "<call f(x)>"
    assert repr(rm.parameter("x.y")) == "parameter('x.y')"
    assert repr(Value(rm.depth([0, 1]))) == "depth([0.0, 1.0])"
    assert repr(Value("x")) == "'x'"


def test_children_are_replaced_in_order() -> None:
    call = Call("f", (A,), (("x", B), ("y", A)))
    one, two, three = (Model(name) for name in "xyz")
    changed = call.with_children([one, two, three])
    assert changed.args == (one,)
    assert changed.kwargs == (("x", two), ("y", three))
    assert A.with_children([]) is A
    assert isinstance(Parameter("p").with_children(()), Parameter)


def test_nodes_of_another_kind_are_refused() -> None:
    class Odd(Node):
        __slots__ = ()

    with pytest.raises(RecipeError, match="Odd is not a kind of node\nhint: Model, Value, Parameter or Call"):
        Odd().digest()


GOLDEN = "d2276c6fe08bd2b532ae7c13c08c0210"
