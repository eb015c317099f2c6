"""Mixtures of experts: which model is read as which part, and what cannot be meant."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import remelt as rm
from remelt.errors import RecipeError
from remelt.recipe.mixture import BASE, EXPERT, ROUTER, SHARED, SHARED_GATE, expand_mixtures, mixture_of_experts
from remelt.recipe.node import Call, MixturePart, Model, Node
from remelt.recipe.walk import topological
from remelt.text.reader import read_recipe
from remelt.text.writer import write_recipe


def parts(recipe: Node) -> list[tuple[str, MixturePart | None]]:
    return [(node.name, node.part) for node in topological(expand_mixtures(recipe)) if isinstance(node, Model)]


def test_every_model_becomes_a_view_of_its_part() -> None:
    options: dict[str, Any] = {"experts_per_token": 1, "style": "mixtral", "seed": 3}
    recipe = mixture_of_experts("base", rm.weighted_sum(rm.model("a"), rm.model("b")), "c", **options)
    alike: dict[str, Any] = {"experts": 2, "per_token": 1, "style": "mixtral", "seed": 3}
    assert parts(recipe) == [
        ("base", MixturePart(BASE, **alike)),
        ("a", MixturePart(EXPERT, 0, **alike)),
        ("b", MixturePart(EXPERT, 0, **alike)),
        ("c", MixturePart(EXPERT, 1, **alike)),
        ("base", MixturePart("random", **alike)),
    ]
    expanded = expand_mixtures(recipe)
    assert isinstance(expanded, Call)
    assert expanded.method == "fallback"


def test_the_shared_expert_is_the_base_or_what_is_said() -> None:
    found = [(name, part.role) for name, part in parts(mixture_of_experts("base", "a", "b", router="gates")) if part]
    assert found[3:] == [("base", SHARED), ("gates", ROUTER), ("base", SHARED_GATE)]
    found = parts(mixture_of_experts("base", "a", "b", shared="s", router=rm.model("g") + "h", style="qwen2_moe"))
    named = [(name, part.role, part.stated) for name, part in found if part]
    assert named[3:] == [
        *(("s", SHARED, True), ("g", ROUTER, False), ("h", ROUTER, False), ("base", SHARED_GATE, False)),
    ]


def test_the_text_says_the_same() -> None:
    text = (
        'version 1\nmixture_of_experts("base", "a", weighted_sum("b", "c"), router="gates", shared="s", '
        'experts_per_token=1, style="qwen2_moe", seed=5)\n'
    )
    recipe = read_recipe(text)
    again = read_recipe(write_recipe(recipe))
    assert again.digest() == recipe.digest()
    made = mixture_of_experts(
        "base",
        "a",
        rm.weighted_sum("b", "c"),
        router="gates",
        shared="s",
        experts_per_token=1,
        style="qwen2_moe",
        seed=5,
    )
    assert {(name, part) for name, part in parts(made)} == {(name, part) for name, part in parts(recipe)}
    drawn = read_recipe('version 1\nmixture_of_experts("base", "a", "b", router="zero")\n')
    assert [part.role for _, part in parts(drawn) if part][-1] == "zero"


def test_a_recipe_without_mixtures_is_itself() -> None:
    recipe = rm.weighted_sum("a", "b")
    assert expand_mixtures(recipe) is recipe


def test_a_part_is_another_model_to_hashes_and_pickles() -> None:
    expanded = expand_mixtures(mixture_of_experts("base", "a", "b"))
    again = pickle.loads(pickle.dumps(expanded))
    assert again.digest() == expanded.digest()
    assert expanded.digest() != expand_mixtures(mixture_of_experts("base", "b", "a")).digest()
    assert [node.part for node in topological(again) if isinstance(node, Model)] == [
        part for _, part in parts(expanded)
    ]


def test_only_the_base_has_a_vocabulary() -> None:
    from remelt.recipe.vocabulary import expand_vocabularies

    aligned = expand_vocabularies(rm.align_vocabulary(mixture_of_experts("base", "a", "b", style="mixtral")))
    models = [node for node in topological(expand_mixtures(aligned)) if isinstance(node, Model)]
    assert [node.vocabulary is not None for node in models] == [True, False, False, False]


REFUSED = {
    'mixture_of_experts("base", "a")': "needs a base and at least two experts, but got 1 beside the base",
    "mixture_of_experts()": "needs a base and at least two experts, but got 0 beside the base",
    'mixture_of_experts("base", "a", "b", experts_per_token=3)': "asks 1 to 2 experts for a token, as many as it has, "
    "but got 3",
    'mixture_of_experts("base", "a", "b", experts_per_token=0)': "asks 1 to 2 experts for a token, as many as it has, "
    "but got 0",
    'mixture_of_experts("base", "a", "b", experts_per_token=1.5)': "needs a whole number for 'experts_per_token', "
    "but got 1.5",
    'mixture_of_experts("base", "a", "b", seed="x")': "needs a whole number for 'seed', but got 'x'",
    'mixture_of_experts("base", "a", "b", style="mistral")': "has a style of mixtral, qwen2_moe, qwen3_moe, "
    "but got 'mistral'\nhint: did you mean 'mixtral'?",
    'mixture_of_experts("base", "a", "b", router=1)': "has a router that is random, uniform_random, zero or a model, "
    "but got 1",
    'mixture_of_experts("base", "a", "b", shared=0.5)': "has a model as its shared expert",
    'mixture_of_experts("base", "a", "b", routers="zero")': "has no argument 'routers'\nhint: did you mean 'router'?",
    'mixture_of_experts("base", "a", 0.5)': "takes models, and its numbers by name",
    'mixture_of_experts("base", "a", mixture_of_experts("base", "a", "b"))': "a mixture of mixtures is not made",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_mixture_is_refused_with_its_place(text: str) -> None:
    recipe = read_recipe(f"version 1\n{text}\n", "mix.mecha")
    with pytest.raises(RecipeError) as caught:
        expand_mixtures(recipe)
    message, _, hint = REFUSED[text].partition("\nhint: ")
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert caught.value.span is not None and caught.value.span.line == 2


def test_python_refuses_at_once() -> None:
    with pytest.raises(RecipeError, match="asks 1 to 2 experts for a token"):
        mixture_of_experts("base", "a", "b", experts_per_token=4)
    with pytest.raises(RecipeError, match="at least two experts, but got 1 beside the base"):
        mixture_of_experts("base", "a")
