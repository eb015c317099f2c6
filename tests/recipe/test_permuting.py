"""Permuted and aligned models in recipes: which are read how, what a text says, and what cannot be meant."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

import remelt as rm
from remelt.errors import RecipeError
from remelt.recipe.axis_orders import AlignedTo, PermutedBy
from remelt.recipe.node import Model, Node
from remelt.recipe.permuting import expand_permutations, permute, rebasin
from remelt.recipe.walk import topological
from remelt.text.reader import read_recipe
from remelt.text.writer import write_recipe


def uses(recipe: Node) -> list[tuple[str, object]]:
    return [(node.name, node.permuted) for node in topological(expand_permutations(recipe)) if isinstance(node, Model)]


def test_every_model_below_is_permuted_and_no_other() -> None:
    named = rm.weighted_sum(rm.model("a"), permute(rm.weighted_sum(rm.model("b"), rm.model("c")), "P", inverse=True))
    by = (PermutedBy("P", inverse=True),)
    assert uses(named) == [("a", None), ("b", by), ("c", by)]


def test_one_is_done_after_the_other() -> None:
    ((_, found),) = uses(permute(rebasin("b", to="a", start="identity", crossing=True), "P"))
    assert found == (AlignedTo(rm.model("a"), "identity", True), PermutedBy("P"))


def test_a_reference_may_be_permuted_itself() -> None:
    ((_, found),) = uses(rebasin("b", to=permute("a", "P")))
    assert isinstance(found, tuple)
    assert found[0].reference.permuted == (PermutedBy("P"),)


def test_a_recipe_without_permutations_is_itself() -> None:
    recipe = rm.weighted_sum("a", "b")
    assert expand_permutations(recipe) is recipe


def test_the_text_says_the_same() -> None:
    text = """version 1
a = model("a")
b = model("b")
P = model("P.safetensors")
step1 = permute(rebasin(b, to=a, start="signature"), P, inverse=True)
weighted_sum(a, step1, alpha=0.3)
"""
    made = rm.weighted_sum(
        rm.model("a"), permute(rebasin("b", to="a", start="signature"), "P.safetensors", inverse=True), alpha=0.3
    )
    assert write_recipe(made) == text
    assert write_recipe(read_recipe(text)) == text
    short = (
        'version 1\nweighted_sum(model("a"), permute(rebasin("b", to="a", start="signature"), "P.safetensors", True))'
    )
    assert uses(read_recipe(text)) == uses(made)
    with pytest.raises(RecipeError, match="takes a model and a permutation file, but got 3"):
        uses(read_recipe(short))


def test_a_permuted_model_is_another_to_hashes_and_equal_ones_are_one() -> None:
    one, other, plain = (uses_of(recipe) for recipe in (rebasin("b", to="a"), rebasin("b", to="a"), rm.model("b")))
    assert one.digest() == other.digest() != plain.digest()
    assert one.permuted == other.permuted
    assert hash(one.permuted) == hash(other.permuted)
    assert uses_of(rebasin("b", to=rm.model("a", sha256="0" * 64))).permuted != one.permuted
    assert pickle.loads(pickle.dumps(one)).permuted[0].reference.name == "a"


def uses_of(recipe: Node) -> Model:
    found = expand_permutations(recipe)
    assert isinstance(found, Model)
    return found


def test_the_package_of_that_name_can_be_called_as_the_word() -> None:
    import remelt.alignment.files  # noqa: F401  (which makes remelt.alignment the package)

    assert uses(rm.rebasin("b", to="a")) == uses(rebasin("b", to="a"))


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda: permute("a", 0.5), "permutations are a file", 'permute("b"'),
        (lambda: permute("a", rm.model({}, name="x")), "permutations are a file", 'permute("b"'),
        (lambda: expand_permutations(permute(0.5, "P")), "what is permuted is a model, or a recipe", 'permute("b"'),
        (
            lambda: expand_permutations(permute(rm.stack_layers(rm.layers("a", 0, 2)), "P")),
            "permute takes models and what methods make of them, but stack_layers gives other tensors|but layers gives",
            "permute the models inside it",
        ),
        (lambda: rebasin("b", to="a", start="everywhere"), "matching starts from identity, signature, both", None),
        (lambda: rebasin("b", to="a", start="identty"), "but got 'identty'", "did you mean 'identity'?"),
        (lambda: rebasin("b", to=0.5), "rebasin aligns to a model", "merge the recipe first"),
        (lambda: rebasin("b", to=rm.weighted_sum("a", "c")), "rebasin aligns to a model", "merge the recipe first"),
        (
            lambda: expand_permutations(rebasin(rm.weighted_sum(rm.model("b"), rm.model("c")), to="a")),
            "rebasin aligns a model, no recipe or adapter",
            "an adapter follows its model by permute",
        ),
        (
            lambda: expand_permutations(permute("a", rm.parameter("p"))),
            "parameter 'p' is still open",
            "compose\\(recipe, p=...\\)",
        ),
        (lambda: expand_permutations(rebasin("b", to=rm.parameter("p"))), "parameter 'p' is still open", "fill it"),
        (
            lambda: expand_permutations(read_recipe('version 1\npermute("a", "P", invers=True)')),
            "permute has no argument 'invers'",
            "did you mean 'inverse'?",
        ),
        (
            lambda: expand_permutations(read_recipe('version 1\npermute("a", "P", inverse=1)')),
            "inverse is True or False",
            'permute\\("b"',
        ),
        (
            lambda: expand_permutations(read_recipe('version 1\nrebasin("b", too="a")')),
            "rebasin has no argument 'too'",
            "did you mean 'to'?",
        ),
        (lambda: expand_permutations(read_recipe('version 1\nrebasin("b")')), "and by name the one", 'rebasin\\("b"'),
        (
            lambda: expand_permutations(read_recipe('version 1\nrebasin("b", to="a", crossing=2)')),
            "crossing is True or False",
            'rebasin\\("b"',
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], object], message: str, hint: str | None) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        make()
    if hint is not None:
        assert refused.value.hint is not None
        assert hint.replace("\\", "") in refused.value.hint
