"""Deep and wide recipes: neither recursion nor exponential work anywhere."""

from __future__ import annotations

import pickle

import pytest
import torch

import remelt as rm
from remelt.recipe.node import Node

DEEP = 100_000


def chain(length: int, a: Node, b: Node) -> Node:
    recipe = a
    for _ in range(length):
        recipe = rm.weighted_sum(recipe, b, alpha=0.001)
    return recipe


def test_a_hundred_thousand_chained_calls_plan_and_run() -> None:
    a, b = ({"v": torch.full((3,), fill), "w": torch.full((2, 2), fill)} for fill in (1.0, 2.0))
    recipe = chain(DEEP, rm.model(a), rm.model(b))
    merged = rm.merge(recipe)
    assert torch.allclose(merged["v"], torch.full((3,), 2.0), atol=1e-3)


def test_a_thousand_stacked_diamonds_run_at_once() -> None:
    recipe: Node = rm.model({"w": torch.tensor([1.0, -3.0])})
    for _ in range(1_000):
        recipe = rm.weighted_sum(recipe, recipe, alpha=0.5)
    assert torch.equal(rm.merge(recipe)["w"], torch.tensor([1.0, -3.0]))
    assert rm.deserialize(rm.serialize(rm.weighted_sum("a", "a"))).digest() == rm.weighted_sum("a", "a").digest()


@pytest.mark.slow
def test_deep_recipes_are_written_read_hashed_pickled_and_printed() -> None:
    recipe = chain(DEEP, rm.model("a"), rm.model("b"))
    text = rm.serialize(recipe)
    again = rm.deserialize(text)
    assert again.digest() == recipe.digest()
    assert pickle.loads(pickle.dumps(recipe)).digest() == recipe.digest()
    assert len(repr(recipe)) < 100
    assert rm.serialize(again) == text


def test_text_of_stacked_diamonds_is_linear() -> None:
    recipe: Node = rm.model("a")
    for _ in range(1_000):
        recipe = rm.weighted_sum(recipe, recipe)
    assert len(rm.serialize(recipe)) < 60_000
