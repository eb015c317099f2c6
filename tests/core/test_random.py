"""Random numbers by position: the same mask for any cut, another for any other identity."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remelt.core.random import Random

WHOLE = Random(seed=1, method="drop", key="layers.0.weight", offset=0, size=1000)


@given(st.lists(st.integers(0, 1000), max_size=12))
def test_any_cut_gives_the_same_numbers(places: list[int]) -> None:
    edges = sorted({0, 1000, *places})
    parts = [replace(WHOLE, offset=a, size=b - a).uniform() for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), WHOLE.uniform())


@pytest.mark.parametrize("offset", [2**31 - 3, 2**32 + 1, 2**40 + 2])
def test_tensors_of_any_size_have_numbers_of_their_own(offset: int) -> None:
    far = replace(WHOLE, offset=offset, size=16).uniform()
    assert np.array_equal(replace(WHOLE, offset=offset + 5, size=3).uniform(), far[5:8])
    assert not np.array_equal(far, WHOLE.uniform()[:16])


@pytest.mark.parametrize("change", [{"seed": 2}, {"method": "dare"}, {"key": "layers.1.weight"}, {"seed": -1}])
def test_another_identity_has_other_numbers(change: dict[str, object]) -> None:
    other = replace(WHOLE, **change)  # type: ignore[arg-type]
    assert np.mean(other.uniform() == WHOLE.uniform()) < 0.01


def test_each_stream_has_its_own_numbers() -> None:
    assert np.mean(WHOLE.uniform(0) == WHOLE.uniform(1)) < 0.01
    assert np.array_equal(WHOLE.uniform(), WHOLE.uniform(0))


def test_names_that_join_to_one_text_are_still_two() -> None:
    assert not np.array_equal(Random(1, "ab", "c", 0, 8).uniform(), Random(1, "a", "bc", 0, 8).uniform())


def test_numbers_are_uniform_between_0_and_1() -> None:
    drawn = replace(WHOLE, size=200_000).uniform()
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert abs(counts - 10_000).max() < 500
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01


def test_an_empty_slice_has_no_numbers() -> None:
    assert replace(WHOLE, offset=7, size=0).uniform().shape == (0,)


def test_numbers_never_change_between_versions() -> None:
    assert Random(0, "m", "k", 0, 4).uniform().tolist() == GOLDEN
    assert Random(0, "m", "k", 2, 2).uniform().tolist() == GOLDEN[2:]


GOLDEN = [0.7036220573551241, 0.46224724922674487, 0.9714608854013369, 0.11415252219323135]
