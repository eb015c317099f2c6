"""Thresholds are exact whatever a sample says, and a sample saves a pass over all elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import remelt as rm
from remelt.engine.tiles import TaskRun
from remelt.engine.units import pieces
from remelt.methods import METHODS
from remelt.methods.selection import SELECTION
from remelt.planning.cost import CHUNK, FOLD, SAMPLE, SMALL

NUMBERS = {reduction.function.__name__: number for number, reduction in enumerate(SELECTION)}
SIZE = 5 * CHUNK + 13


@given(size=st.integers(0, 2**33))
@example(size=SMALL)
@example(size=SMALL + 1)
def test_a_sample_lies_within_and_is_the_whole_where_that_is_little(size: int) -> None:
    found = pieces(0, size)
    assert found[0][0] == 0
    assert all(begin % CHUNK == 0 for begin, _ in found)
    assert all(end <= following for (_, end), (following, _) in itertools.pairwise(found))
    assert found[-1][1] <= size
    taken = sum(end - begin for begin, end in found)
    assert taken == size if size <= SMALL else 0.9 * SAMPLE <= taken <= SAMPLE


def deltas(kind: str, seed: int, size: int) -> torch.Tensor:
    """Differences of models, of kinds that samples are good and bad for."""
    drawn = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=drawn)
    if kind == "misleading":  # what a sample looks at is far from the rest
        for begin, end in pieces(0, size):
            values[begin:end] *= 1e-6
    elif kind == "few values":
        values = torch.randint(-3, 4, (size,), generator=drawn).float()
    elif kind == "none":
        values = torch.zeros(size)
    elif kind == "any size":
        values = torch.exp2(torch.randint(-140, 120, (size,), generator=drawn).float()) * values.sign()
    return values


def trimmed(values: torch.Tensor, k: float) -> torch.Tensor:
    """The share of values that are largest, by sorting."""
    magnitudes = values.abs().sort().values
    threshold = magnitudes[max(int((1.0 - k) * len(values)), 1) - 1]
    return torch.where(values.abs() >= threshold, values, 0.0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The rounds of reductions of each slice that is swept."""
    seen: list[set[int]] = []
    stretch = TaskRun.stretch

    def watched(run: TaskRun, sweep: Any, *given: Any) -> Any:
        seen.append({number for _, number in sweep.reductions})
        return stretch(run, sweep, *given)

    monkeypatch.setattr(TaskRun, "stretch", watched)
    return seen


ROUNDS = {
    "plain": ("_guesses", "_near"),
    "few values": ("_guesses", "_near"),
    "none": ("_guesses", "_near"),
    "misleading": ("_guesses", "_near", "_uppers", "_lowers"),
}


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("size", [SIZE, pytest.param(2 * FOLD + 3 * CHUNK + 1, marks=pytest.mark.slow)])
def test_a_wrong_guess_costs_passes_and_no_bit(executor: str, passes: list[set[int]], kind: str, size: int) -> None:
    values = deltas(kind, 3, size)
    zeros = torch.zeros(size)
    base, tuned = rm.model({"w": zeros}), rm.model({"w": values})
    found = rm.merge(base + rm.ties_sum(tuned - base, k=0.2), threads=2)["w"]
    assert torch.equal(found, trimmed(values, 0.2))
    done = set().union(*passes)
    assert done == {NUMBERS[name] for name in ROUNDS[kind]}


def test_where_the_sample_is_the_whole_it_is_no_guess(executor: str, passes: list[set[int]]) -> None:
    values = deltas("plain", 4, 10_000)
    base, tuned = rm.model({"w": torch.zeros(10_000)}), rm.model({"w": values})
    found = rm.merge(base + rm.ties_sum(tuned - base, k=0.3))["w"]
    assert torch.equal(found, trimmed(values, 0.3))
    assert passes == [{NUMBERS["_guesses"]}, {NUMBERS["_lowers"]}, set()]


def test_models_are_guessed_one_by_one(executor: str, passes: list[set[int]]) -> None:
    kinds = ("plain", "misleading", "few values")
    values = {kind: deltas(kind, 5, SIZE) for kind in kinds}
    base = rm.model({"w": torch.zeros(SIZE)})
    found = rm.merge(base + rm.ties_sum(*[rm.model({"w": values[kind]}) - base for kind in kinds], k=0.1))["w"]
    assert torch.equal(found, METHODS["ties_sum"].on(*[trimmed(values[kind], 0.1) for kind in kinds]))
    assert set().union(*passes) == set(NUMBERS.values())


@settings(max_examples=25)
@given(
    kind=st.sampled_from(["plain", "misleading", "few values", "none", "any size"]),
    seed=st.integers(0, 2**31),
    k=st.floats(0.0, 1.0),
    size=st.sampled_from([1, 2, 1000, SIZE]),
)
def test_thresholds_of_whole_tensors_are_those_of_sorting(kind: str, seed: int, k: float, size: int) -> None:
    values = deltas(kind, seed, size)
    assert torch.equal(METHODS["ties_sum"].on(values, k=k), trimmed(values, k) if k < 1.0 else values)


def test_each_model_has_its_share_and_weight_in_each_block(executor: str) -> None:
    sizes = {"layers.0.part.w": SIZE, "layers.1.part.w": 1000, "layers.2.part.w": 1}
    values = [{key: deltas("plain", seed, size) for key, size in sizes.items()} for seed in (6, 7, 8)]
    base = rm.model({key: torch.zeros(size) for key, size in sizes.items()})
    shares = [0.2, rm.keys({"layers.0.*": 0.4}) | 1.0, rm.depth([0.1, 0.5])]
    weights = [1.0, 2.0, rm.keys({"layers.1.*": -0.5}) | 0.25]
    parts = [rm.model(one) - base for one in values]
    told = {
        "layers.0.part.w": ([0.2, 0.4, 0.1], 0.25),
        "layers.1.part.w": ([0.2, 1.0, 0.3], -0.5),
        "layers.2.part.w": ([0.2, 1.0, 0.5], 0.25),
    }
    for normalize in (True, False):
        recipe = base + rm.ties_sum(*parts, k=shares, weights=weights, vote_sgn=True, normalize=normalize)
        found = rm.merge(recipe, threads=2)
        for key, (share, last) in told.items():
            kept = [
                (trimmed(one[key], k) if k < 1 else one[key]) * weight
                for one, k, weight in zip(values, share, (1.0, 2.0, last), strict=True)
            ]
            elected = sum(kept).sign()
            agreeing = [one.sign() == elected for one in kept]
            total = sum(torch.where(agrees, one, 0.0) for agrees, one in zip(agreeing, kept, strict=True))
            count = sum(agrees * weight for agrees, weight in zip(agreeing, (1.0, 2.0, last), strict=True))
            mean = torch.where(count == 0.0, total, total / count)
            torch.testing.assert_close(found[key], mean if normalize else total)


def test_in_double_precision_what_has_the_threshold_is_kept(executor: str) -> None:
    for size in (1000, SIZE):
        values = deltas("plain", 9, size).double() * 0.1
        values[: size // 2] = 0.1  # no number of float32
        base, tuned = rm.model({"w": torch.zeros(size).double()}), rm.model({"w": values})
        found = rm.merge(base + rm.ties_sum(tuned - base, k=0.5), compute_dtype="float64")["w"]
        threshold = trimmed(values.float(), 0.5).abs()
        assert torch.equal(found != 0.0, threshold > 0.0)
        assert torch.equal(found[found != 0.0], values[found != 0.0])


def test_weights_by_block_do_not_make_reductions_due(executor: str, passes: list[set[int]]) -> None:
    base, tuned = (rm.model({"layers.0.x.w": deltas("plain", seed, SIZE)}) for seed in (1, 2))
    plain = rm.plan(base + rm.ties_sum(tuned - base, weights=2.0))
    recipe = base + rm.ties_sum(tuned - base, weights=[rm.keys({"*": 2.0})])
    assert rm.plan(recipe).bytes_read == plain.bytes_read
    rm.merge(recipe)
    assert passes == [set()]


def test_samples_are_among_what_is_read(executor: str, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    tensors = {f"w{place}": deltas("plain", place, 300_000) for place in range(3)}
    files = [write_model(tmp_path / name, tensors) for name in "ab"]
    base, tuned = map(rm.model, files)
    recipe = base + rm.ties_sum(tuned - base, k=0.3)
    planned = rm.plan(recipe).bytes_read
    assert planned == 4 * 300_000 * 3 * 4 + 2 * 4 * SAMPLE * 3
