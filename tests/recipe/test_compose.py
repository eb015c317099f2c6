"""Composition: parameters filled without capture."""

from __future__ import annotations

from typing import Any

import pytest

import remelt as rm
from remelt.errors import RecipeError
from remelt.recipe.compose import compose, parameters_of, searches_of
from remelt.recipe.node import Call

A, B = rm.model("a"), rm.model("b")


def test_a_filled_parameter_is_gone_and_others_stay() -> None:
    recipe = rm.weighted_sum(rm.parameter("a"), rm.parameter("b"))
    filled = compose(recipe, a="x")
    assert list(parameters_of(filled)) == ["b"]
    assert compose(filled, b="y").digest() == rm.weighted_sum(rm.model("x"), rm.model("y")).digest()


def test_an_inner_parameter_is_never_taken_for_an_outer_one_of_its_name() -> None:
    inner = rm.weighted_sum(rm.parameter("a"), rm.parameter("b"))
    outer = rm.parameter("a") + (rm.parameter("b") - rm.parameter("c"))
    composed = compose(outer, {"a": inner, "b": "outer_b", "c": "outer_c"})
    assert sorted(parameters_of(composed)) == ["a.a", "a.b"]
    done = compose(composed, {"a.a": "inner_a", "a.b": "inner_b"})
    expected = rm.weighted_sum(rm.model("inner_a"), rm.model("inner_b")) + (rm.model("outer_b") - rm.model("outer_c"))
    assert done.digest() == expected.digest()


def test_one_recipe_may_fill_two_parameters() -> None:
    inner = rm.weighted_sum(rm.parameter("x"), "m")
    composed = compose(rm.parameter("a") - rm.parameter("b"), a=inner, b=inner)
    assert sorted(parameters_of(composed)) == ["a.x", "b.x"]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(rm.RecipeError, match="the recipe has no parameter 'alhpa'") as caught:
        compose(rm.parameter("alpha") - rm.parameter("b"), alhpa="x")
    assert "did you mean 'alpha'?" in str(caught.value)
    with pytest.raises(rm.RecipeError, match="its parameters: none"):
        compose(rm.model("a"), zzz="x")


def test_one_name_is_declared_in_one_way() -> None:
    with pytest.raises(
        rm.RecipeError, match="parameter 'a' is declared as weight of any arch and as delta of any arch"
    ):
        parameters_of(rm.parameter("a") + rm.parameter("a", space="delta"))


def test_searches_are_found_in_the_order_of_the_steps() -> None:
    recipe = rm.weighted_sum("a", "b", alpha=rm.search(0, 1)) + rm.search(2, 3) * (rm.model("a") - rm.model("b"))
    assert [(found.low, found.high) for found in searches_of(recipe)] == [(0, 1), (2, 3)]
    blocks = rm.weighted_sum("a", "b", alpha=rm.blocks(IN00=rm.search(0, 1)) | rm.search(4, 5))
    assert len(searches_of(blocks)) == 2


def test_depth_does_not_matter() -> None:
    recipe = rm.parameter("a")
    for _ in range(20_000):
        recipe = rm.weighted_sum(recipe, rm.parameter("b"))
    assert list(parameters_of(compose(recipe, a=recipe))) == ["a.a", "a.b", "b"]


def test_a_text_becomes_a_model_of_the_parameters_space_and_arch() -> None:
    recipe = rm.model("a") + rm.parameter("d", space="delta", arch="sdxl")
    expected = rm.model("a") + rm.model("b", space="delta", arch="sdxl")
    assert compose(recipe, d="b").digest() == expected.digest()
    assert compose(recipe, d=rm.model("b", space="delta")).digest() == expected.digest()
    assert (
        compose(recipe, d=rm.parameter("x", space="delta")).digest()
        == (rm.model("a") + rm.parameter("d.x", space="delta", arch="sdxl")).digest()
    )


@pytest.mark.parametrize(
    ("filling", "message", "hint"),
    [
        (
            rm.model("b"),
            "parameter 'd' has the space delta, but model 'b' that fills it has weight",
            'say what it is: model("b", space="delta")',
        ),
        (
            rm.parameter("x", space="param"),
            "parameter 'd' has the space delta, but parameter 'x' that fills it has param",
            'say what it is: parameter("x", space="delta")',
        ),
        (
            rm.model("b", space="delta", arch="sd1"),
            "parameter 'd' has the arch sdxl, but model 'b' that fills it has sd1",
            'say what it is: model("b", arch="sdxl")',
        ),
    ],
)
def test_a_model_of_another_space_or_arch_is_refused(filling: rm.Node, message: str, hint: str) -> None:
    recipe = rm.model("a") + rm.parameter("d", space="delta", arch="sdxl")
    with pytest.raises(rm.RecipeError) as caught:
        compose(recipe, d=filling)
    assert caught.value.message == message
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("hole", "argument", "message"),
    [
        (
            rm.parameter("x"),
            rm.model("a") - rm.model("b"),
            "'x' has the space weight, but the recipe that fills it gives a delta",
        ),
        (
            rm.parameter("x", space="delta"),
            0.5 * rm.model("a") + 0.5 * rm.model("b"),
            "'x' has the space delta, but the recipe",
        ),
        (
            rm.parameter("x", arch="sdxl"),
            rm.model("a", arch="sd1") + (rm.model("b") - "c"),
            "has the arch sdxl, but model('a') in the recipe",
        ),
    ],
)
def test_a_recipe_of_another_space_or_arch_does_not_fit(hole: Any, argument: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose(hole if hole.arch is None else hole - hole, {"x": argument})
    assert message in str(caught.value)


def test_what_only_methods_tell_is_checked_later() -> None:
    assert compose(rm.parameter("x"), {"x": Call("unheard_of", (rm.model("a"),))}) is not None
    assert compose(rm.parameter("x"), {"x": rm.model("a") + 0.3 * (rm.model("b") - rm.model("c"))}) is not None
