"""Spaces: affine arithmetic accepted where it can be meant, and refused in words where it cannot."""

from __future__ import annotations

from typing import Any

import pytest

import remelt as rm
from remelt.check.bound import bind_recipes
from remelt.check.spaces import infer_masses, name_of
from remelt.methods import METHODS

A, B, C = (rm.model(name) for name in "abc")
DELTA = rm.model("d", space="delta")
MASK = rm.model("m", space="param")
BLOCKS = rm.blocks(IN00=0.3) | 0.5


def space(recipe: Any) -> str | None:
    graph = bind_recipes([recipe], METHODS)
    assert not graph.problems
    masses, problems = infer_masses(graph)
    assert not problems, problems
    return name_of(masses[graph.roots[0]])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (A - B, "delta"),
        (A + (B - C), "weight"),
        (A - (B - C), "weight"),
        (DELTA - DELTA, "delta"),
        (0.5 * A + 0.5 * B, "weight"),
        (0.25 * A + 0.25 * B + 0.5 * C, "weight"),
        (2.0 * A - B, "weight"),
        (A * 0.5 - B * 0.5, "delta"),
        (-A + B, "delta"),
        ((A - B) * BLOCKS, "delta"),
        (MASK * (A - B), "delta"),
        ((A - B) * MASK + C, "weight"),
        (rm.weighted_sum(A, B, alpha=MASK), "weight"),
        (rm.weighted_sum(DELTA, A - B), "delta"),
        (rm.weighted_sum(0.5 * A + 0.5 * B, C), "weight"),
        (rm.n_average(A, B, C), "weight"),
        (rm.slerp(A - B, DELTA), "delta"),
        (rm.perpendicular_component(A - C, B - C), "delta"),
        (rm.add_difference(A, DELTA), "weight"),
        (rm.add_difference(DELTA, DELTA), "delta"),
        (A | B, "weight"),
        (DELTA | (A - B), "delta"),
        (rm.cast(A - B, "fp16"), "delta"),
        (rm.pick_component(A - B, "vae"), "delta"),
        (rm.clamp(A, B, C), "weight"),
    ],
)
def test_what_each_step_means_is_inferred(recipe: Any, expected: str) -> None:
    assert space(recipe) == expected


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (A + B, "a weight cannot be added to a weight: a delta is due"),
        (0.5 * A, "a result is a weight (mass 1) or a delta (mass 0), but this one is 0.5 of a weight"),
        (A * BLOCKS, "only a delta can be scaled by block or by a mask"),
        (A * B, "two models cannot be multiplied"),
        (A * MASK, "only a delta can be multiplied by a param"),
        (A + MASK, "a param cannot be added to a weight or a delta"),
        (MASK | A, "fallback needs operands of one space"),
        (A | DELTA, "fallback needs operands of one space"),
        (rm.add_difference(A, B), "add_difference needs a delta for 'b', but got a weight"),
        (rm.weighted_sum(A, DELTA), "weighted_sum needs one space, but got a weight and a delta for 'b'"),
        (rm.weighted_sum(A, 0.5 * B), "weighted_sum needs a weight or a delta for 'b', but got 0.5 of a weight"),
        (rm.weighted_sum(A, B, alpha=C), "weighted_sum needs a mask (space param) for 'alpha', but got a weight"),
        (rm.weighted_sum(A, MASK), "weighted_sum needs a weight or a delta for 'b', but got a param"),
        (rm.model("m", space="param"), "a result is a weight (mass 1) or a delta (mass 0), but this one is a param"),
    ],
)
def test_what_cannot_be_meant_is_told(recipe: Any, message: str) -> None:
    graph = bind_recipes([recipe], METHODS)
    assert not graph.problems
    _, problems = infer_masses(graph)
    assert [problem.message for problem in problems if message in problem.message], problems


def test_one_mistake_is_told_once() -> None:
    recipe = rm.weighted_sum(rm.weighted_sum(rm.add_difference(A, B), C), A)
    graph = bind_recipes([recipe], METHODS)
    assert len(infer_masses(graph)[1]) == 1


def test_equal_calls_of_equal_operands_are_one_step() -> None:
    graph = bind_recipes([rm.weighted_sum("a", "b") - rm.weighted_sum("a", "b")], METHODS)
    assert len(graph.steps) == 4
