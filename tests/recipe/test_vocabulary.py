"""Vocabularies in recipes: which models are read by whose tokens, and what cannot be meant."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

import remelt as rm
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.recipe.node import Call, Model, Node, Vocabulary
from remelt.recipe.signature import name_all_models
from remelt.recipe.vocabulary import align_vocabulary, expand_vocabularies
from remelt.recipe.walk import topological
from remelt.text.reader import read_recipe
from remelt.text.writer import write_recipe


def vocabularies(recipe: Node) -> dict[str, Vocabulary | None]:
    order = topological(expand_vocabularies(name_all_models(recipe, METHODS)))
    return {node.name: node.vocabulary for node in order if isinstance(node, Model)}


def test_every_model_below_is_aligned_and_no_mask() -> None:
    mask = rm.model("m", space="param")
    recipe = rm.weighted_sum(align_vocabulary(rm.weighted_sum("a", "b", alpha=mask)), "c")
    shared = Vocabulary("a", union=True, base=None, members=("a", "b"))
    assert vocabularies(recipe) == {"a": shared, "b": shared, "m": None, "c": None}


def test_the_order_is_the_bases_or_a_models() -> None:
    merged = rm.weighted_sum("a", "b")
    assert vocabularies(align_vocabulary(merged, base="b", order="base"))["a"] == Vocabulary(
        "b", False, "b", ("a", "b")
    )
    assert vocabularies(align_vocabulary(merged, order="base"))["a"] == Vocabulary("a", False, None, ("a", "b"))
    assert vocabularies(align_vocabulary(merged, base="b"))["a"] == Vocabulary("b", True, "b", ("a", "b"))
    assert vocabularies(align_vocabulary(merged, base="b", order="c"))["a"] == Vocabulary("c", False, "b", ("a", "b"))


def test_what_new_rows_are_and_how_many_there_are_may_be_said() -> None:
    found = vocabularies(align_vocabulary("a", new_rows="own_mean", pad_to_multiple_of=64))
    assert found["a"] == Vocabulary("a", True, None, ("a",), "own_mean", 64)


def test_a_recipe_without_a_vocabulary_is_itself() -> None:
    recipe = rm.weighted_sum("a", "b")
    assert expand_vocabularies(recipe) is recipe


@pytest.mark.parametrize(
    "text",
    [
        'align_vocabulary("a")',
        'align_vocabulary("a", base="b", order="base")',
        'align_vocabulary("a", order="c")',
        'align_vocabulary("a", order=model("c"))',
        'align_vocabulary(weighted_sum("a", "b"), base="a")',
        'align_vocabulary(weighted_sum("a", "b"), new_rows="zero", pad_to_multiple_of=64)',
    ],
)
def test_the_text_says_the_same(text: str) -> None:
    recipe = read_recipe(f"version 1\n{text}\n")
    again = read_recipe(write_recipe(recipe))
    assert again.digest() == recipe.digest()
    assert vocabularies(again) == vocabularies(recipe)


def test_a_view_is_another_model_to_hashes_and_pickles() -> None:
    plain = rm.weighted_sum("a", "b")
    aligned = expand_vocabularies(name_all_models(align_vocabulary(plain), METHODS))
    assert aligned.digest() != plain.digest()
    assert vocabularies(pickle.loads(pickle.dumps(aligned))) == vocabularies(aligned)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Call("align_vocabulary"), "align_vocabulary takes a recipe, and by name a base, an order"),
        (
            lambda: Call("align_vocabulary", (Model("a"),), (("bas", Model("a")),)),
            "takes a recipe, and by name a base, an order, new_rows and pad_to_multiple_of",
        ),
        (lambda: align_vocabulary(rm.parameter("a")), "there is no model below align_vocabulary"),
        (lambda: align_vocabulary("a", base=rm.scale("a", 0.5)), "what is aligned is a recipe, and its base a model"),
        (
            lambda: align_vocabulary("a", order=rm.scale("a", 0.5)),
            'the order of a vocabulary is "union", "base" or a model',
        ),
        (
            lambda: align_vocabulary("a", new_rows="zeros"),
            "new_rows is one of theirs, mean, own_mean, zero, but got 'zeros'\nhint: did you mean 'zero'?",
        ),
        (
            lambda: align_vocabulary("a", pad_to_multiple_of=0),
            "pad_to_multiple_of is a whole number from 1 on, but got 0",
        ),
        (
            lambda: align_vocabulary("a", pad_to_multiple_of=True),
            "pad_to_multiple_of is a whole number from 1 on, but got True",
        ),
        (lambda: align_vocabulary(align_vocabulary("a")), "a vocabulary is aligned once, around all that is merged"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], Node], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        expand_vocabularies(make())
    assert message in str(caught.value)
