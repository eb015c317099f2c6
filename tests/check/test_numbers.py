"""Numbers that differ from key to key: their defaults, what no weight speaks for, and recipes that are joined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import remelt as rm
from remelt.api.merging import Merged, prepare_merges, run_prepared
from remelt.api.options import MergeOptions
from remelt.api.recipes import load_recipe
from remelt.errors import RecipeError
from remelt.recipe.method import Number, Numbers, Same, Shortcut, merge_method


@merge_method(cut="element")
def times(a: Same, *, factor: Number = 1) -> Same:  # an integer on purpose
    return a * factor


@merge_method(cut="element")
def bare(a: Same, *, factor: Number) -> Same:
    return a * factor


@merge_method(cut="element")
def total(*models: Same, weights: Numbers = 1) -> Same:
    found: Tensor = sum(model * weight for model, weight in zip(models, weights, strict=True))  # type: ignore[assignment]
    return found


SPECIMENS = True
KEYS = ("layers.0.x.w", "layers.1.x.w", "layers.2.x.w")
FIRST = rm.keys({"layers.0.*": 5.0})


def model(value: float = 1.0) -> Any:
    return rm.model({key: torch.full((4,), value) for key in KEYS})


def values(recipe: Any) -> list[float]:
    found = rm.merge(recipe)
    return [float(found[key][0]) for key in KEYS]


def test_a_default_may_be_a_whole_number() -> None:
    assert values(times(model(), factor=FIRST)) == [5.0, 1.0, 1.0]
    assert values(total(model(), model(2.0), weights=[FIRST, 3.0])) == [11.0, 7.0, 7.0]


def test_where_there_is_no_default_each_key_needs_a_number() -> None:
    with pytest.raises(RecipeError, match=r"bare: factor has no number for layers.1.x.w, and no default\nhint: let a"):
        rm.merge(bare(model(), factor=FIRST))
    assert values(bare(model(), factor=FIRST | 2.0)) == [5.0, 2.0, 2.0]


def test_what_no_weight_speaks_for_is_told_by_place() -> None:
    second = rm.keys({"layers.1.*": 5.0})
    notes = rm.plan(total(model(), model(2.0), weights=[FIRST, second])).notes
    assert sorted(note.partition(" for ")[0] for note in notes) == [
        "total: weights[0] = 1 by default",
        "total: weights[1] = 1 by default",
    ]
    assert all("for 2 keys" in note for note in notes)


def test_recipes_with_lists_by_block_are_joined() -> None:
    a, b = model(), model(2.0)
    recipes = [total(a, b, weights=[FIRST | 1.0, place + 2.0]) for place in range(2)]
    recipes += [total(a, b, weights=[3.0, FIRST | 0.5])]
    with prepare_merges([load_recipe(recipe) for recipe in recipes], [None] * 3, MergeOptions()) as prepared:
        (group,) = prepared.groups
        assert [len(planned.task.outputs) for planned in group.plan.tasks] == [3, 3, 3]
        (*_, merged) = run_prepared(prepared, MergeOptions())
    assert isinstance(merged, Merged)
    found = [[float(merged.tensors[place][key][0]) for key in KEYS] for place in range(3)]
    assert found == [[9.0, 5.0, 5.0], [11.0, 7.0, 7.0], [13.0, 4.0, 4.0]]


def test_a_shortcut_is_at_one_number() -> None:
    def short(*models: Same, weights: Numbers = 1.0) -> Same:
        return models[0]

    with pytest.raises(RecipeError, match="a shortcut is at one number, but 'weights' is one for each model"):
        merge_method(cut="element", shortcuts=(Shortcut("weights", 0.0, "models"),))(short)
