"""Stacks of layers: which models are read in which part, and what cannot be meant."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

import remelt as rm
from remelt.errors import RecipeError
from remelt.recipe.layers import expand_layers, layers, stack_layers
from remelt.recipe.node import Call, LayerRange, Model, Node
from remelt.recipe.walk import topological
from remelt.text.reader import read_recipe
from remelt.text.writer import write_recipe


def ranges(recipe: Node) -> list[tuple[str, LayerRange | None]]:
    return [(node.name, node.layers) for node in topological(expand_layers(recipe)) if isinstance(node, Model)]


def test_each_part_follows_the_one_before() -> None:
    recipe = stack_layers(layers("a", 0, 16), layers("b", 8, 24), layers("a", 4, 6))
    assert ranges(recipe) == [
        ("a", LayerRange(0, 16, 0, None, before=True, after=False)),
        ("b", LayerRange(8, 24, 16, None, before=False, after=False)),
        ("a", LayerRange(4, 6, 32, None, before=False, after=True)),
    ]
    expanded = expand_layers(recipe)
    assert isinstance(expanded, Call)
    assert expanded.method == "fallback"


def test_a_part_may_be_a_recipe_and_stand_in_one() -> None:
    merged = rm.weighted_sum(layers("a", 0, 2), layers(rm.model("b") + (rm.model("c") - "b"), 2, 4), alpha=0.5)
    found = dict(ranges(rm.cast(stack_layers(merged, layers("a", 2, 3)), "fp16")))
    assert found["c"] == LayerRange(2, 4, 0, None, before=True, after=False)
    assert found["a"] == LayerRange(2, 3, 2, None, before=False, after=True)


def test_layers_by_themselves_are_a_shorter_model() -> None:
    assert ranges(layers("a", 2, 4, stack="blocks")) == [("a", LayerRange(2, 4, 0, "blocks"))]


def test_a_recipe_without_layers_is_itself() -> None:
    recipe = rm.weighted_sum("a", "b")
    assert expand_layers(recipe) is recipe


def test_the_text_says_the_same() -> None:
    text = 'version 1\nstack_layers(layers("a", 0, 16), layers(model("b"), 8, stop=24, stack="h"))\n'
    recipe = read_recipe(text)
    assert [one.name for one in topological(recipe) if isinstance(one, Model)] == ["a", "b"]
    again = read_recipe(write_recipe(recipe))
    assert again.digest() == recipe.digest()
    assert ranges(recipe)[1] == ("b", LayerRange(8, 24, 16, "h", before=False, after=True))


def test_a_view_is_another_model_to_hashes_and_pickles() -> None:
    view = Model("a", layers=LayerRange(0, 2, 0))
    assert view.digest() != Model("a").digest()
    assert pickle.loads(pickle.dumps(view)).layers == view.layers


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: layers("a", 0.5, 2), "layers needs a whole number for 'start', but got 0.5"),  # type: ignore[arg-type]
        (lambda: stack_layers(), "stack_layers needs at least one part"),
        (lambda: expand_layers(layers("a", 3, 3)), "from 0 on, but got 3 to 3"),
        (lambda: expand_layers(stack_layers("a")), "part 1 of stack_layers says no layers"),
        (
            lambda: expand_layers(stack_layers(rm.weighted_sum(layers("a", 0, 2), layers("b", 0, 3)))),
            "part 1 of stack_layers merges 2 and 3 layers",
        ),
        (
            lambda: expand_layers(stack_layers(layers("a", 0, 2) + (rm.model("b") - "c"))),
            "model.'b'. stands beside layers, and has no layers said",
        ),
        (lambda: expand_layers(stack_layers(layers(layers("a", 0, 2), 0, 1))), "layers of layers are not taken"),
        (lambda: expand_layers(read_recipe('version 1\nlayers("a", 0)')), "layers needs a model and two numbers"),
        (lambda: expand_layers(read_recipe('version 1\nlayers("a", 0, 2, end=3)')), "layers has no 'end'"),
        (lambda: expand_layers(read_recipe('version 1\nlayers("a", 0, "2")')), "layers counts in whole numbers"),
        (lambda: expand_layers(read_recipe('version 1\nstack_layers(x="a")')), "stack_layers takes parts"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wrong()
