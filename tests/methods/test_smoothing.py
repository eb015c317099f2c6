"""Smoothing: beside the filters of SciPy that supermerger calls."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.methods import METHODS
from remelt.testing import MethodConformance

both, median, gaussian = (METHODS[name] for name in ("smooth_add", "smooth_add_median", "smooth_add_gaussian"))

SHAPES = ((), (0,), (0, 4), (4, 0), (1,), (2,), (3,), (131,), (1, 1), (1, 9), (9, 1), (2, 2), (16, 33), (5000, 3))
KERNELS = ((4, 3, 3, 3), (6, 5, 1, 1), (1, 4, 3, 3), (20, 7, 3, 3), (5, 6, 7), (2, 3, 2, 3, 2))


def drawn(*shape: int, count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def gap(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due.double()).abs().max()) if due.numel() else 0.0


@pytest.mark.parametrize("shape", [*SHAPES, *KERNELS], ids=str)
def test_smoothing_is_that_of_supermerger(shape: tuple[int, ...]) -> None:
    filters = pytest.importorskip("scipy.ndimage")
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        for scale in (1.0, 1e-4, 1e-15, 1e4):
            a, b = (scale * tensor for tensor in drawn(*shape, dtype=dtype))
            middle = filters.median_filter(b.numpy(), size=3) if b.numel() and b.dim() else b.numpy()
            smooth = filters.gaussian_filter(middle, sigma=1) if b.numel() else middle
            blurred = filters.gaussian_filter(b.numpy(), sigma=1) if b.numel() else b.numpy()
            for method, values in ((both, smooth), (median, middle), (gaussian, blurred)):
                found = method.on(a, b, alpha=0.7)
                assert found.dtype == dtype
                assert gap(found, a + 0.7 * torch.tensor(values)) <= bound * scale * 4.0


@pytest.mark.parametrize("sigma", [0.2, 0.5, 2.0, 5.0])
def test_other_widths_are_those_of_scipy(sigma: float) -> None:
    filters = pytest.importorskip("scipy.ndimage")
    for shape in ((131,), (1, 3), (2, 2), (16, 33), (4, 3, 3, 3)):
        a, b = drawn(*shape, dtype=torch.float64)
        due = a + torch.tensor(filters.gaussian_filter(b.numpy(), sigma=sigma))
        assert gap(gaussian.on(a, b, sigma=sigma), due) < 1e-13


def mirrored(place: int, size: int) -> int:
    """A place beyond the borders, by mirrors at them."""
    place %= 2 * size
    return place if place < size else 2 * size - 1 - place


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2, 3)], ids=str)
def test_smoothing_follows_the_formula(shape: tuple[int, ...]) -> None:
    a, b = drawn(*shape, dtype=torch.float64)
    places = list(itertools.product(*map(range, shape)))

    def at(tensor: Tensor, place: tuple[int, ...], shift: tuple[int, ...]) -> float:
        moved = [mirrored(p + s, size) for p, s, size in zip(place, shift, shape, strict=True)]
        return float(tensor[tuple(moved)])

    near = list(itertools.product((-1, 0, 1), repeat=len(shape)))
    due = torch.tensor([statistics.median(at(b, place, shift) for shift in near) for place in places])
    assert gap(median.on(a, b), a + due.double().reshape(shape)) < 1e-6
    curve = {shift: math.exp(-(shift**2) / (2 * 0.5**2)) for shift in range(-2, 3)}
    area = sum(curve.values()) ** len(shape)
    around = list(itertools.product(curve, repeat=len(shape)))
    means = [sum(math.prod(curve[s] for s in shift) * at(b, place, shift) for shift in around) for place in places]
    blurred = torch.tensor(means, dtype=torch.float64).reshape(shape) / area
    assert gap(gaussian.on(a, b, sigma=0.5), a + blurred) < 1e-13


@pytest.mark.parametrize("shape", [(9,), (5, 6), (3, 3, 3), (4, 3, 3, 3)], ids=str)
def test_nan_shows_where_it_is_a_neighbour(shape: tuple[int, ...]) -> None:
    a, b = drawn(*shape)
    b.view(-1)[0] = math.nan
    near = torch.ones(shape, dtype=torch.bool)
    for dimension in range(len(shape)):
        near &= (torch.arange(shape[dimension]) < 2).reshape(-1, *[1] * (len(shape) - 1 - dimension))
    assert torch.equal(median.on(a, b).isnan(), near)


def test_no_width_is_no_filter() -> None:
    a, b = drawn(16, 33)
    assert torch.equal(gaussian.on(a, b, sigma=0.0), a + b)
    assert torch.equal(both.on(a, b, sigma=-1.0), median.on(a, b))


@settings(max_examples=50, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), level=st.floats(-5.0, 5.0), seed=st.integers(0, 50))
def test_a_level_difference_stays_level(shape: list[int], level: float, seed: int) -> None:
    a, b = drawn(*shape, seed=seed, dtype=torch.float64)
    for method in (both, median, gaussian):
        assert gap(method.on(a, torch.full_like(a, level)), a + level) < 1e-12
        assert gap(method.on(a, b + level), method.on(a, b) + level) < 1e-12
        assert gap(method.on(a, -3.0 * b), a - 3.0 * (method.on(a, b) - a)) < 1e-12
        assert gap(method.on(a, b.flip(0)).flip(0) - a.flip(0), method.on(a, b) - a) < 1e-12


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_merge_gives_what_the_methods_give(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a, b, c = ({"w": x, "bias": x[0], "kernel": x.reshape(30, 20, 3, 3)} for x in drawn(60, 90, count=3))
    for method in (both, median, gaussian):
        found = rm.merge(method(rm.model(a), rm.model(b) - rm.model(c), alpha=0.3), threads=2)
        for key in a:
            assert gap(found[key], method.on(a[key], b[key] - c[key], alpha=0.3)) < 1e-6


class TestConformance(MethodConformance):
    @pytest.fixture(params=["smooth_add", "smooth_add_median", "smooth_add_gaussian"])
    def method(self, request: pytest.FixtureRequest) -> Any:
        return request.param
