"""The best permutation of one group, against every permutation that it has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from remelt.alignment.assignment import Fit, Solver, solve
from remelt.alignment.permutation import Permutation, identity, random_permutation
from remelt.archs.axis_groups import AxisGroup, Level
from remelt.errors import MissingExtraError

GROUPED = AxisGroup("grouped", (Level("group", 3), Level("member", 2, ("group",))), ())
HEADS = AxisGroup("heads", (Level("head", 2), Level("qk", 3, ("head",)), Level("value", 2, ("head",))), ())
QUERIES = AxisGroup("queries", (Level("head", 2), Level("query", 2, ("head",)), Level("value", 2, ("head",))), ())
SHARED = AxisGroup("shared", (Level("head", 3), Level("qk", 3)), ())
CELLS = AxisGroup("cells", (Level("channel", 6, cells=(1, 3, 2)),), ())
TERMS = {
    "grouped": [("group", "member"), ("group",)],
    "heads": [("head", "qk"), ("head", "value")],
    "queries": [("head", "query"), ("head", "value"), ("head", "query", "value"), ("head",)],
    "shared": [("head", "qk"), ("qk",)],
    "cells": [("channel",)],
}


def all_permutations(group: AxisGroup) -> Iterator[dict[str, np.ndarray]]:
    """Every permutation of a group, as its parts."""
    choices = []
    for level in group.levels:
        cells, start, whole = level.cells or (level.size,), 0, []
        for cell in cells:
            whole.append([tuple(start + place for place in one) for one in itertools.permutations(range(cell))])
            start += cell
        rows = [sum(one, ()) for one in itertools.product(*whole)]
        extent = group.extent(level)
        count = int(np.prod(extent[:-1])) if len(extent) > 1 else 1
        choices.append([np.array(one, np.int32).reshape(extent) for one in itertools.product(rows, repeat=count)])
    for one in itertools.product(*choices):
        yield {level.name: part for level, part in zip(group.levels, one, strict=True)}


def value(group: AxisGroup, terms: dict[tuple[str, ...], torch.Tensor], parts: dict[str, np.ndarray]) -> float:
    """What a permutation is worth, summed one index after another."""
    total, permutation = 0.0, Permutation(group, parts)
    for levels, term in terms.items():
        sources = permutation.coordinates(levels)
        for place in itertools.product(*(range(size) for size in group.shape(levels))):
            total += float(term[place + tuple(int(one[place]) for one in sources)])
    return total


def random_terms(group: AxisGroup, seed: int, ties: bool) -> dict[tuple[str, ...], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for levels in TERMS[group.name]:
        shape = group.shape(levels) * 2
        found[levels] = (
            torch.randint(-2, 3, shape, generator=generator).float()
            if ties
            else torch.randn(shape, generator=generator)
        )
    if group.name == "cells":
        ends = np.cumsum((0, 1, 3, 2))
        mask = torch.zeros(6, 6)
        for start, stop in itertools.pairwise(ends):
            mask[start:stop, start:stop] = 1
        found["channel",] *= mask
    return found


@pytest.mark.parametrize("group", [GROUPED, HEADS, CELLS], ids=lambda group: group.name)
@given(seed=st.integers(0, 2**31), ties=st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_best_of_all_permutations_is_found(group: AxisGroup, seed: int, ties: bool) -> None:
    terms = random_terms(group, seed, ties)
    start = random_permutation(group, np.random.default_rng(seed))
    found, gain = solve(group, terms, start)
    best = max(value(group, terms, parts) for parts in all_permutations(group))
    reached = value(group, terms, {level.name: found.parts[level.name] for level in group.levels})
    assert reached == pytest.approx(best, abs=1e-4)
    assert gain == pytest.approx(best - value(group, terms, dict(start.parts)), abs=1e-4)


@pytest.mark.parametrize("group", [QUERIES, SHARED], ids=lambda group: group.name)
@given(seed=st.integers(0, 2**31), ties=st.booleans())
@settings(deadline=None, max_examples=40)
def test_levels_that_meet_in_a_window_never_lose_and_end_where_no_one_of_them_gains(
    group: AxisGroup, seed: int, ties: bool
) -> None:
    terms = random_terms(group, seed, ties)
    start = random_permutation(group, np.random.default_rng(seed))
    found, gain = solve(group, terms, start)
    reached = value(group, terms, {level.name: found.parts[level.name] for level in group.levels})
    assert gain >= 0
    assert reached == pytest.approx(value(group, terms, dict(start.parts)) + gain, abs=1e-4)
    _, more = solve(group, terms, found)
    assert more == pytest.approx(0.0, abs=1e-4)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 9), ties=st.booleans())
@settings(deadline=None, max_examples=1000)
def test_largest_values_in_distinct_columns_are_the_solver_s_answer(seed: int, size: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        values = torch.randint(0, 3, (size, size), generator=generator).float()
    else:
        values = torch.eye(size)[torch.randperm(size, generator=generator)] * 2 + torch.randn(
            size, size, generator=generator
        )
    solver = Solver()
    chosen = solver.assigned(values, current=np.arange(size, dtype=np.int32))
    rows, columns = linear_sum_assignment(values.numpy(), maximize=True)
    assert sorted(chosen.tolist()) == list(range(size))
    assert float(values[range(size), chosen].sum()) == pytest.approx(float(values[rows, columns].sum()), abs=1e-5)


def test_the_solver_is_not_asked_where_rows_have_their_largest_values_in_distinct_columns() -> None:
    solver = Solver()
    assert solver.assigned(torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 0.0], [0.0, 0.0, 2.0]])).tolist() == [1, 0, 2]
    assert solver.asked == 0
    assert solver.assigned(torch.tensor([[3.0, 2.0], [2.0, 0.0]])).tolist() == [1, 0]
    assert solver.asked == 1


def test_what_is_as_good_as_any_other_stays_where_it_is() -> None:
    current = np.array([2, 0, 1], np.int32)
    assert Solver().assigned(torch.zeros(3, 3), current=current).tolist() == [2, 0, 1]


def test_the_value_of_a_fit_is_the_sum_of_what_is_chosen() -> None:
    terms = random_terms(HEADS, 3, ties=False)
    parts = dict(random_permutation(HEADS, np.random.default_rng(0)).parts)
    assert Fit.of(HEADS, terms, Solver()).value(parts) == pytest.approx(value(HEADS, terms, parts), abs=1e-5)
    still = {level.name: identity(level, HEADS) for level in HEADS.levels}
    assert Fit.of(HEADS, terms, Solver()).value(still) == pytest.approx(value(HEADS, terms, still), abs=1e-5)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError) as refused:
        Solver().assigned(torch.tensor([[3.0, 2.0], [2.0, 0.0]]))
    assert str(refused.value) == (
        'alignment needs scipy, whose solver finds assignments\nhint: pip install "remelt[rebasin]"'
    )
