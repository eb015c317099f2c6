"""Dropping at random: by what it promises of the mean, and by how often each element is kept, here and by the peers."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.api.merging import Merged, prepare_merges, run_prepared
from remelt.api.options import MergeOptions
from remelt.api.recipes import load_recipe
from remelt.core.random import Random
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.methods.dropping import kept_counts
from remelt.testing import MethodConformance

DTYPES = (torch.float32, torch.float64)
MANY = 100_000
SIGMAS = 5.0
"""Standard deviations that a count of this test's fixed draws may be from what is due."""


class TestConformance(MethodConformance):
    @pytest.fixture(params=["dare", "della", "dropout"])
    def method(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(params=["enlarged", "plain"])
    def values(self, method: str, request: pytest.FixtureRequest) -> dict[str, Any]:
        if method == "dropout":
            return {
                "probability": 0.4,
                "overlap": 0.3,
                "overlap_emphasis": 0.7,
                "rescale": float(request.param == "plain"),
            }
        return {"density": 0.3, "rescale": request.param == "enlarged"}


def applied(name: str, *deltas: Tensor, key: str = "x.w", seed: int = 0, **values: Any) -> Tensor:
    drawn = Random(seed=seed, method=name, key=key, offset=0, size=deltas[0].numel())
    found: Tensor = METHODS[name].on(*deltas, **values, seed=seed, random=drawn)
    return found


def is_likely(count: int, trials: int, probability: float) -> bool:
    return abs(count - trials * probability) <= SIGMAS * math.sqrt(trials * probability * (1.0 - probability)) + 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_the_mean_of_dare_is_the_delta(density: float, dtype: torch.dtype) -> None:
    delta = torch.full((MANY,), 0.3, dtype=dtype)
    found = applied("dare", delta, density=density)
    assert is_likely(int(found.count_nonzero()), MANY, density)
    kept = torch.tensor(0.3, dtype=dtype) / density
    assert torch.equal(found, torch.where(found != 0.0, kept, 0.0))
    plain = applied("dare", delta, density=density, rescale=False)
    assert torch.equal(plain, torch.where(found != 0.0, delta, 0.0))


def test_dare_of_mergekit_is_rescaled_by_the_draw() -> None:
    sparsify = pytest.importorskip("mergekit.sparsify")
    delta = torch.randn(MANY, generator=torch.Generator().manual_seed(0))
    for rescale in (None, sparsify.RescaleNorm.l1):
        theirs = sparsify.bernoulli(delta, 0.3, rescale_norm=rescale)
        ours = applied("dare", delta, density=0.3, rescale=rescale is not None)
        assert is_likely(int(theirs.count_nonzero()), MANY, 0.3)
        both = (ours != 0.0) & (theirs != 0.0)
        assert is_likely(int(both.sum()), MANY, 0.09)
        torch.testing.assert_close(ours[both], theirs[both], rtol=0.02 if rescale else 0.0, atol=0.0)


@pytest.mark.parametrize("name", ["dare", "della"])
def test_all_is_kept_at_one_and_nothing_at_zero(name: str) -> None:
    for shape in ((), (0,), (0, 4), (4, 0), (1,), (7,), (3, 5), (2, 3, 3, 3)):
        for dtype in DTYPES:
            delta = torch.ones(shape, dtype=dtype)
            for density in (1.0, 1.5):
                assert torch.equal(applied(name, delta, density=density), delta)
            for density in (0.0, -0.5):
                assert torch.equal(applied(name, delta, density=density), torch.zeros_like(delta))
    assert torch.equal(applied(name, torch.tensor([float("nan")] * 9), density=0.0), torch.zeros(9))


def rows_of(count: int, width: int) -> Tensor:
    """Rows whose elements have all ranks, in any order."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(width, generator=generator) for _ in range(count)])
    signs = torch.randint(2, (count, width), generator=generator) * 2.0 - 1.0
    return (ranks + 1.0) * signs


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.3), (0.8, -0.1), (0.4, 0.0), (0.9, 0.4)])
def test_della_keeps_by_rank_and_its_mean_is_the_delta(density: float, epsilon: float) -> None:
    rows, width = 20_000, 6
    delta = rows_of(rows, width)
    found = applied("della", delta, density=density, epsilon=epsilon)
    plain = applied("della", delta, density=density, epsilon=epsilon, rescale=False)
    room = math.copysign(min(abs(epsilon), density, 1.0 - density), epsilon)
    for rank in range(width):
        due = density - room + 2.0 * room * rank / (width - 1)
        here = delta.abs() == rank + 1.0
        kept = here & (found != 0.0)
        assert is_likely(int(kept.sum()), rows, min(max(due, 0.0), 1.0)), rank
        assert torch.equal(plain[here], torch.where(found != 0.0, delta, 0.0)[here])
        if kept.any():
            torch.testing.assert_close(found[kept], delta[kept] / due, rtol=1e-5, atol=0.0)


def test_della_keeps_as_often_as_mergekit() -> None:
    theirs = pytest.importorskip("mergekit.sparsify").della_magprune
    rows, width = 20_000, 6
    delta = rows_of(rows, width)
    torch.manual_seed(0)
    kept_there = theirs(delta, 0.6, 0.2) != 0.0
    kept_here = applied("della", delta, density=0.6, epsilon=0.2) != 0.0
    for rank in range(width):
        here = delta.abs() == rank + 1.0
        for kept in (kept_there, kept_here):
            assert is_likely(int((kept & here).sum()), rows, 0.4 + 0.4 * rank / (width - 1)), rank


def test_dellas_epsilon_is_half_of_sd_mechas() -> None:
    pytest.importorskip("sd_mecha")
    module = importlib.import_module("sd_mecha.extensions.builtin.merge_methods.ties")
    delta = rows_of(1, 5)
    generator = torch.Generator().manual_seed(0)
    trials = 1000
    kept = sum(module.find_della_dropout(delta, 0.4, 0.5, generator) for _ in range(trials))
    many = delta.expand(trials, 5).contiguous()
    ours = (applied("della", many, density=0.6, epsilon=0.25 * (5 - 1) / 5) != 0.0).sum(0)
    for there, here, rank in zip(kept[0], ours, delta[0].abs(), strict=True):
        due = 0.6 + 0.5 * (float(rank) - 3.0) / 5.0
        assert is_likely(int(there), trials, due)
        assert is_likely(int(here), trials, due)


def test_a_row_of_one_element_is_kept_by_the_density() -> None:
    found = applied("della", torch.ones(MANY, 1), density=0.3)
    assert is_likely(int(found.count_nonzero()), MANY, 0.3)
    assert float(found.max()) == pytest.approx(1.0 / 0.3)


@pytest.mark.parametrize("name", ["dare", "della", "dropout"])
def test_masks_differ_by_key_and_by_seed(name: str) -> None:
    delta = torch.ones(MANY // 10, 10)
    share = {"dare": {"density": 0.5}, "della": {"density": 0.5, "epsilon": 0.0}, "dropout": {"probability": 0.5}}[name]
    masks = [applied(name, delta, **share, **other) != 0.0 for other in ({}, {"key": "y.w"}, {"seed": 1}, {"seed": -1})]
    for one, other in itertools.combinations(masks, 2):
        assert is_likely(int((one & other).sum()), MANY, 0.25)


def by_subsets(count: int, p: float, overlap: float, emphasis: float) -> list[float]:
    """The probabilities of how many are kept, added up over all sets, as sd-mecha defines them."""
    sets = [sum(bits) for bits in itertools.product((0, 1), repeat=count) if sum(bits)]
    if overlap % 2 == 1:
        return [math.comb(count, m) * (1 - p) ** m * p ** (count - m) for m in range(count + 1)]
    if overlap % 2 == 0:
        chances = np.array([float(m == 1) / count for m in sets])
    else:
        turned = -overlap if math.floor(overlap) % 2 == 1 else overlap
        powers = np.exp([math.tan(math.pi * (turned - 0.5)) * (m - count / 2) for m in sets])
        chances = powers / powers.sum()
    binomial = np.array([p**m * (1 - p) ** (count - m) for m in sets])
    mixed = chances + (1 - abs(2 * overlap - 1)) * (binomial / binomial.sum() - chances)
    chances = chances + emphasis * (mixed - chances)
    return [p, *((1 - p) * sum(chances[place] for place, m in enumerate(sets) if m == k) for k in range(1, count + 1))]


@pytest.mark.parametrize("emphasis", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0, -1.0, 3.0])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_how_many_meet_is_as_sd_mecha_defines_it(count: int, p: float, overlap: float, emphasis: float) -> None:
    np.testing.assert_allclose(
        kept_counts(count, p, overlap, emphasis), by_subsets(count, p, overlap, emphasis), atol=1e-9
    )


@given(
    count=st.integers(1, 40),
    p=st.floats(0.0, 1.0),
    overlap=st.floats(-3.0, 3.0),
    emphasis=st.floats(0.0, 1.0),
)
def test_chances_add_up_to_one(count: int, p: float, overlap: float, emphasis: float) -> None:
    found = kept_counts(count, p, overlap, emphasis)
    assert all(0.0 <= one <= 1.0 + 1e-9 for one in found)
    assert sum(found) == pytest.approx(1.0)
    np.testing.assert_allclose(kept_counts(count, p, -overlap, emphasis), found, atol=1e-6)


SETS = {
    sum(2.0**i for i in chosen) / len(chosen): chosen
    for m in (1, 2, 3)
    for chosen in itertools.combinations(range(3), m)
}
"""The sets of three deltas, by the means of 1, 2 and 4."""


def chosen_sets(**values: Any) -> dict[tuple[int, ...], int]:
    """How often each set of three deltas is kept."""
    deltas = [torch.full((MANY,), 2.0**place, dtype=torch.float64) for place in range(3)]
    found = applied("dropout", *deltas, rescale=0.0, **values)
    counts = {
        chosen: int(torch.isclose(found, torch.tensor(mean, dtype=torch.float64)).sum())
        for mean, chosen in SETS.items()
    }
    assert sum(counts.values()) + int((found == 0.0).sum()) == MANY
    return counts


@pytest.mark.parametrize(("overlap", "emphasis"), [(0.0, 0.0), (0.3, 0.0), (0.5, 0.6), (0.9, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("p", [0.0, 0.6, 0.9])
def test_sets_are_as_frequent_as_they_should(p: float, overlap: float, emphasis: float) -> None:
    chances = kept_counts(3, p, overlap, emphasis)
    for chosen, times in chosen_sets(probability=p, overlap=overlap, overlap_emphasis=emphasis).items():
        due = chances[len(chosen)] / math.comb(3, len(chosen))
        assert is_likely(times, MANY, min(due, 1.0)), chosen


def test_overlap_is_from_one_delta_alone_to_all_together() -> None:
    alone = chosen_sets(probability=0.3, overlap=0.0)
    assert all(times == 0 for chosen, times in alone.items() if len(chosen) > 1)
    together = chosen_sets(probability=0.3, overlap=0.9999)
    assert all(times == 0 for chosen, times in together.items() if len(chosen) < 3)


def test_independent_masks_are_as_frequent_as_sd_mechas() -> None:
    theirs = pytest.importorskip("sd_mecha").extensions.merge_methods.resolve("dropout").__wrapped__
    deltas = [torch.full((MANY,), 2.0**place, dtype=torch.float64) for place in range(3)]
    found = theirs(*deltas, probability=0.6, rescale=0.0, overlap=1.0, seed=0)
    ours = chosen_sets(probability=0.6, overlap=1.0)
    for mean, chosen in SETS.items():
        due = 0.4 ** len(chosen) * 0.6 ** (3 - len(chosen))
        for times in (int(torch.isclose(found, torch.tensor(mean, dtype=torch.float64)).sum()), ours[chosen]):
            assert is_likely(times, MANY, due)
    with pytest.raises(TypeError):  # known: remelt does what this was to do
        theirs(*deltas, probability=0.6, overlap=0.5, seed=0)


@pytest.mark.parametrize("rescale", [0.0, 0.5, 1.0])
def test_what_is_left_is_enlarged(rescale: float) -> None:
    found = applied("dropout", torch.ones(MANY), torch.ones(MANY), probability=0.75, overlap=0.0, rescale=rescale)
    assert set(found.tolist()) == {0.0, 0.25**-rescale}


def test_dropout_at_its_ends() -> None:
    deltas = [torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert not applied("dropout", *deltas, probability=1.0).any()
    assert not applied("dropout", *deltas, probability=7.0).any()
    torch.testing.assert_close(applied("dropout", *deltas, probability=0.0), sum(deltas) / 3)
    torch.testing.assert_close(applied("dropout", *deltas, probability=-1.0), sum(deltas) / 3)
    assert torch.equal(applied("dropout", deltas[0], probability=0.0, overlap=0.4, overlap_emphasis=1.0), deltas[0])
    for rescale in (1e9, -1e9):
        assert applied("dropout", *deltas, probability=0.9, rescale=rescale).shape == (2, 5)


def test_many_deltas_need_no_table_of_sets() -> None:
    deltas = [torch.full((1000,), float(place)) for place in range(100)]
    found = applied("dropout", *deltas, probability=0.0, overlap=0.0)
    assert torch.equal(found, found.round())
    assert len(set(found.tolist())) > 90


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("name", ["dare", "della", "dropout"])
def test_merges_give_what_the_method_gives(name: str, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    shapes = {"x.w": (301, 17), "x.k": (4, 3, 3, 3), "x.b": (17,), "x.s": ()}
    generator = torch.Generator().manual_seed(0)
    models = [
        {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        for _ in range(3 if name == "dropout" else 1)
    ]
    base = rm.model({key: torch.zeros(shape) for key, shape in shapes.items()})
    values: dict[str, Any] = {"probability": 0.4, "overlap": 0.3} if name == "dropout" else {"density": 0.4}
    found = rm.merge(base + METHODS[name](*[rm.model(one) - base for one in models], **values, seed=5), threads=2)
    for key in shapes:
        assert torch.equal(found[key], applied(name, *[one[key] for one in models], key=key, seed=5, **values)), key


def test_each_model_has_a_seed_of_its_own() -> None:
    tensors = {"x.w": torch.ones(MANY)}
    base = rm.model({"x.w": torch.zeros(MANY)})
    parts: Sequence[Any] = [METHODS["dare"](rm.model(tensors) - base, density=0.5, seed=seed) for seed in (1, 2)]
    found = rm.merge(base + METHODS["ties"](*parts, normalize=False))["x.w"]
    for kept, due in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert is_likely(int((found == 2.0 * kept).sum()), MANY, due)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: METHODS["dare"]("a", "b"), "dare takes 1 positional argument, but got 2"),
        (lambda: METHODS["dare"]("a", seed=0.5), "dare needs a whole number for 'seed', but got 0.5"),
        (lambda: METHODS["della"]("a", epsilon="x"), "della needs a number or block weights for 'epsilon'"),
        (lambda: METHODS["dropout"]("a", rescale=True), "dropout needs a number or block weights for 'rescale'"),
        (lambda: METHODS["dropout"](), "dropout needs at least one model"),
    ],
)
def test_wrong_arguments_are_told(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wrong()


@pytest.fixture
def three() -> list[rm.Model]:
    drawn = torch.Generator().manual_seed(0)
    return [rm.model({"x.w": torch.randn(500, generator=drawn)}, name=name) for name in "abc"]


def kept(recipe: rm.Node) -> Tensor:
    return rm.merge(recipe)["x.w"] != 0.0


@pytest.mark.parametrize("method", [rm.dare, functools.partial(rm.della, epsilon=0.0)], ids=["dare", "della"])
def test_models_lose_different_elements(method: Callable[..., rm.Node], three: list[rm.Model]) -> None:
    a, b, c = three
    masks = [kept(method(a - c)), kept(method(b - c))]
    assert torch.equal(*masks)  # each is the first of its recipe
    both = rm.merge(method(a - c) + rm.scale(method(b - c), alpha=2.0**-20))["x.w"]
    first, second = both.abs() > 1e-4, (both != 0.0) & (both.abs() < 1e-4)
    assert torch.equal(first, masks[0])
    assert is_likely(int((first & masks[1]).sum() + second.sum()), 500, 0.75)  # a half, and a half of the other half


def test_equal_calls_draw_alike(three: list[rm.Model]) -> None:
    a, b, _ = three
    assert not rm.merge(rm.dare(a - b) - rm.dare(a - b))["x.w"].any()
    assert rm.merge(rm.dare(a - b) - rm.dare(a - b, seed=1))["x.w"].any()


def test_what_is_drawn_does_not_depend_on_what_is_merged_with_it(three: list[rm.Model]) -> None:
    a, b, c = three
    recipes = [rm.dare(a - c), rm.dare(b - c), rm.dare(a - c) + rm.dare(b - c), rm.dare(b - c) + rm.dare(a - c)]
    options = MergeOptions(threads=1)
    with prepare_merges([load_recipe(one) for one in recipes], [None] * len(recipes), options) as prepared:
        (*_, merged) = run_prepared(prepared, options)
    assert isinstance(merged, Merged)
    for place, one in enumerate(recipes):
        assert torch.equal(rm.merge(one)["x.w"], merged.tensors[place]["x.w"])
