"""Trimming by magnitude beside mergekit, sd-mecha, and plain sorting; where they part, why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.testing import MethodConformance

DTYPES = (torch.float32, torch.float64)
SHAPES = ((), (0,), (1,), (131,), (16, 33), (4, 3, 3, 3), (200, 300))
SHARES = (0.0, 0.2, 0.5, 0.7, 1.0)
BANDS = ((0.1, 0.01), (0.5, 0.0), (0.3, 0.3), (0.6, 0.4), (0.9, 0.5), (0.05, 0.9), (1.0, 0.2))
SAMPLED = 400_000
"""Elements of a tensor of which a sample is taken first."""


class TestConformance(MethodConformance):
    @pytest.fixture(params=["trim", "breadcrumbs"])
    def method(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def values(self, method: str) -> dict[str, Any]:
        return {"k": 0.3} if method == "trim" else {"density": 0.3, "gamma": 0.1}


def structured(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        yield f"shape {shape}", torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    first = torch.randn(16, 33, generator=generator, dtype=torch.float64).to(dtype)
    yield "tiny", first * 1e-15
    yield "huge", first * 1e15
    yield "as small as the steps of a fine-tune", first * 1e-4
    yield "denormal", (first * 1e-39).float().to(dtype)
    yield "zero", torch.zeros_like(first)
    yield "equal magnitudes", first.sign()
    yield "few magnitudes", (first * 2.0).round()
    yield "mostly zero", torch.where(first > 1.0, first, 0.0)


INTENDED = {
    ("trim", "equal magnitudes"): "all elements as large as the threshold are kept: which of them were dropped is luck",
    ("trim", "few magnitudes"): "as above",
    ("breadcrumbs", "equal magnitudes"): "elements as large as a limit are all kept",
    ("breadcrumbs", "few magnitudes"): "as above",
    ("breadcrumbs", "shape ()"): "one element at least is kept: mergekit loses a tensor of one element",
    ("breadcrumbs", "shape (1,)"): "as above",
}
"""Where remelt and mergekit are meant to differ, and why; the tests of the formulas say what remelt gives there."""


def by_sorting(delta: Tensor, k: float) -> Tensor:
    if not delta.numel() or k >= 1.0:
        return delta
    magnitudes = delta.float().abs().flatten().sort().values
    return torch.where(delta.float().abs() >= magnitudes[max(int((1 - k) * delta.numel()), 1) - 1], delta, 0.0)


def band_by_sorting(delta: Tensor, density: float, gamma: float) -> Tensor:
    size = delta.numel()
    if not size or density >= 1.0:
        return delta
    if density <= 0.0:
        return torch.zeros_like(delta)
    kept = max(int(density * size), 1)
    bottom = max(size - kept - int(max(gamma, 0.0) * size), 0)
    magnitudes = delta.float().abs().flatten().sort().values
    low, high = magnitudes[bottom], magnitudes[bottom + kept - 1]
    return torch.where((delta.float().abs() >= low) & (delta.float().abs() <= high), delta, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_are_their_formulas(dtype: torch.dtype) -> None:
    for what, delta in structured(dtype):
        for k in SHARES:
            assert torch.equal(METHODS["trim"].on(delta, k=k), by_sorting(delta, k)), (what, k)
        for density, gamma in (*BANDS, (0.0, 0.1), (-1.0, 0.1), (0.5, -0.3), (1.5, 0.1)):
            found = METHODS["breadcrumbs"].on(delta, density=density, gamma=gamma)
            assert torch.equal(found, band_by_sorting(delta, density, gamma)), (what, density, gamma)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trim_is_the_first_step_of_sd_mechas_ties(dtype: torch.dtype) -> None:
    theirs: Callable[..., Tensor] = pytest.importorskip("sd_mecha").ties_sum.__wrapped__
    for what, delta in structured(torch.float32):  # in float64, its threshold may be rounded to above its own element
        delta = delta.to(dtype)
        for k in SHARES[:-1]:
            due = theirs(delta.clone(), k=k).to(dtype)
            assert torch.equal(METHODS["trim"].on(delta, k=k), due.reshape(delta.shape)), (what, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trim_is_mergekits_magnitude_of_as_many_elements(dtype: torch.dtype) -> None:
    magnitude = pytest.importorskip("mergekit.sparsify").magnitude
    for what, delta in structured(dtype):
        for k in SHARES[:-1]:
            found = METHODS["trim"].on(delta, k=k)
            if delta.numel() and ("trim", what) not in INTENDED:
                kept = delta.numel() - max(int((1 - k) * delta.numel()), 1) + 1
                assert torch.equal(found, magnitude(delta, (kept + 0.5) / delta.numel())), (what, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_breadcrumbs_are_mergekits(dtype: torch.dtype) -> None:
    outliers = pytest.importorskip("mergekit.sparsify").magnitude_outliers
    for what, delta in structured(dtype):
        for density, gamma in BANDS:
            found = METHODS["breadcrumbs"].on(delta, density=density, gamma=gamma)
            if ("breadcrumbs", what) not in INTENDED:
                assert torch.equal(found, outliers(delta, density, gamma=gamma)), (what, density, gamma)


@pytest.mark.parametrize(("name", "what"), INTENDED, ids=" ".join)
def test_every_intended_difference_is_one(name: str, what: str) -> None:
    sparsify = pytest.importorskip("mergekit.sparsify")
    delta = dict(structured(torch.float32))[what]
    if name == "trim":
        kept = METHODS["trim"].on(delta, k=0.5), sparsify.magnitude(delta, 0.5)
    else:
        kept = (
            METHODS["breadcrumbs"].on(delta, density=0.5, gamma=0.1),
            sparsify.magnitude_outliers(delta, 0.5, gamma=0.1),
        )
    ours, theirs = (int(one.count_nonzero()) for one in kept)
    assert ours > theirs


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 300),
    levels=st.sampled_from([2, 5, 10_000]),
    density=st.floats(0.0, 1.0),
    gamma=st.floats(0.0, 1.0),
)
def test_any_share_of_any_tensor_is_exact(seed: int, size: int, levels: int, density: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randint(-levels, levels, (size,), generator=generator) * 1e-4
    assert torch.equal(METHODS["trim"].on(delta, k=density), by_sorting(delta, density))
    found = METHODS["breadcrumbs"].on(delta, density=density, gamma=gamma)
    assert torch.equal(found, band_by_sorting(delta, density, gamma))
    scaled = METHODS["breadcrumbs"].on(delta * 2.0**-20, density=density, gamma=gamma)
    assert torch.equal(scaled, found * 2.0**-20)


@pytest.mark.parametrize("name", ["trim", "breadcrumbs"])
def test_numbers_out_of_range_are_meant_as_the_nearest(name: str) -> None:
    delta = torch.tensor([1.0, -2.0, 3.0])
    for dtype in DTYPES:
        one = delta.to(dtype)
        if name == "trim":
            assert torch.equal(METHODS[name].on(one, k=7.0), one)
            assert torch.equal(METHODS[name].on(one, k=-1.0), METHODS[name].on(one, k=0.0))
        else:
            assert torch.equal(METHODS[name].on(one, density=7.0), one)
            assert not METHODS[name].on(one, density=-1.0).any()


def test_what_is_no_number_is_lost_and_infinities_are_the_largest() -> None:
    odd = torch.tensor([float("nan"), float("-inf"), 1.0, 2.0])
    assert METHODS["trim"].on(odd, k=0.5).tolist() == [0.0, float("-inf"), 0.0, 2.0]
    assert METHODS["breadcrumbs"].on(odd, density=0.5, gamma=0.25).tolist() == [0.0, float("-inf"), 0.0, 2.0]


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("kind", ["plain", "outliers at the end", "few values"])
def test_merges_give_the_same_of_samples_and_of_small_tensors(
    executor: str, kind: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    tuned = {key: torch.randn(size, generator=generator) for key, size in (("a", SAMPLED), ("b", 1000), ("c", 1))}
    if kind == "few values":
        tuned = {key: one.round() for key, one in tuned.items()}
    elif kind == "outliers at the end":
        tuned["a"][-SAMPLED // 7 :] *= 1e6
    base = rm.model({key: torch.zeros_like(one) for key, one in tuned.items()})
    delta = rm.model(tuned) - base
    trimmed = rm.merge(base + METHODS["trim"](delta, k=rm.keys({"a": 0.1}) | 0.6), threads=2)
    banded = rm.merge(base + METHODS["breadcrumbs"](delta, density=rm.keys({"a": 0.5}) | 0.3, gamma=0.05), threads=2)
    for key, one in tuned.items():
        assert torch.equal(trimmed[key], by_sorting(one, 0.1 if key == "a" else 0.6)), key
        assert torch.equal(banded[key], band_by_sorting(one, 0.5 if key == "a" else 0.3, 0.05)), key


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: METHODS["trim"]("a", "b"), "trim takes 1 positional argument, but got 2"),
        (lambda: METHODS["trim"]("a", density=0.5), "trim has no argument 'density'"),
        (lambda: METHODS["trim"]("a", k="all"), "trim needs a number or block weights for 'k', but got 'all'"),
        (lambda: METHODS["breadcrumbs"]("a", gamma=[0.1]), "breadcrumbs needs a number or block weights for 'gamma'"),
    ],
)
def test_wrong_arguments_are_told(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        wrong()
