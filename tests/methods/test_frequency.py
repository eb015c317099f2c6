"""Crossovers: beside sd-mecha's, and the formula with sums of sines and cosines."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import remelt as rm
from remelt.methods import METHODS
from remelt.testing import MethodConformance

crossover, distribution = METHODS["crossover"], METHODS["distribution_crossover"]

SHAPES = ((), (0,), (0, 4), (4, 0), (1,), (2,), (131,), (16, 33), (33, 16), (7, 1), (1, 7), (4, 3, 3, 3), (5, 6, 7))
TILTS = (0.0, 0.1, 0.3, 0.7, 1.0, 1.2, 1.5, 1.9, 2.1, 2.5, 3.0, 3.4, 3.9, 4.0, 5.5, -0.5, -1.5)
INTENDED = {
    (
        "crossover",
        "tilt 2",
    ): "sd-mecha takes the frequencies below 1 - alpha, where those beside tilt 2 are below alpha",
    (
        "crossover",
        "close",
    ): "sd-mecha gives a weighted sum where the tensors are equal to 8 decimals, remelt a crossover",
    ("crossover", "alpha above 1"): "sd-mecha raises",
    ("crossover", "on the edge"): "where a frequency is at the edge, round-off decides in sd-mecha",
}
"""Where the two are meant to differ, and why; a test for each says what remelt gives there."""


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Tensor]:
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.crossover")
    function: Callable[..., Tensor] = module.crossover.__wrapped__
    return function


def drawn(*shape: int, count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def gap(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due.double()).abs().max()) if due.numel() else 0.0


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("alpha", [0.0, 0.13, 0.37, 0.71, 1.0])
def test_crossovers_agree_with_sd_mecha(theirs: Callable[..., Tensor], tilt: float, alpha: float) -> None:
    for shape in SHAPES:
        for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 2e-6)):  # its filters are of float32
            for scale in (1.0, 1e4, 1e-3):
                a, b = (scale * tensor for tensor in drawn(*shape, dtype=dtype))
                found = crossover.on(a, b, alpha=alpha, tilt=tilt)
                assert found.dtype == dtype
                due = theirs(a.clone(), b.clone(), alpha=alpha, tilt=tilt)
                assert gap(found, due) <= bound * float(a.abs().max() if a.numel() else 0.0)


def test_structured_tensors_agree_with_sd_mecha(theirs: Callable[..., Tensor]) -> None:
    (a,) = drawn(16, 33, count=1)
    for b in (a, -a, torch.zeros_like(a), torch.ones_like(a), a + 0.01 * drawn(16, 33, seed=1)[0]):
        for tilt in (0.0, 0.4, 1.3, 3.2):
            assert gap(crossover.on(a, b, alpha=0.37, tilt=tilt), theirs(a, b, alpha=0.37, tilt=tilt)) < 1e-5


def test_the_filter_at_tilt_2_is_the_limit_of_those_beside(theirs: Callable[..., Tensor]) -> None:
    a, b = drawn(131)
    ours, other = (
        [function(a, b, alpha=0.3, tilt=tilt) for tilt in (2.0 - 1e-9, 2.0, 2.0 + 1e-9)]
        for function in (crossover.on, theirs)
    )
    assert gap(ours[1], ours[0]) < 1e-5
    assert gap(ours[1], ours[2]) < 1e-5
    assert gap(other[0], other[2]) < 1e-5
    assert gap(other[1], other[0]) > 0.1
    assert gap(ours[1], other[0]) < 1e-5


def test_close_tensors_are_crossed_too(theirs: Callable[..., Tensor]) -> None:
    a, b = (1e-9 * tensor for tensor in drawn(131))
    assert gap(theirs(a, b, alpha=0.3), torch.lerp(a, b, 0.3)) == 0.0
    assert gap(crossover.on(a, b, alpha=0.3), 1e-9 * crossover.on(1e9 * a, 1e9 * b, alpha=0.3)) < 1e-23


def test_a_share_out_of_range_is_the_end_of_the_range(theirs: Callable[..., Tensor]) -> None:
    a, b = drawn(16, 33)
    assert torch.equal(crossover.on(a, b, alpha=1.5), b)
    assert torch.equal(crossover.on(a, b, alpha=-0.5), a)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        theirs(a, b, alpha=1.5)


def test_a_frequency_on_the_edge_is_of_the_side_that_is_left() -> None:
    a, b = drawn(20)  # frequencies 0, 0.1, ... 1
    at = crossover.on(a, b, alpha=0.3)
    assert gap(at, crossover.on(a, b, alpha=0.3 - 1e-3)) < 1e-12
    assert gap(at, crossover.on(a, b, alpha=0.3 + 1e-3)) > 1e-3


def share_of(radius: float, alpha: float, tilt: float) -> float:
    """The filter by the formula in the documentation."""
    tilt = abs(tilt) % 4.0
    tilt = min(tilt, 4.0 - tilt)
    if tilt == 0.0:
        return float(radius > 1.0 - alpha)
    if tilt == 2.0:
        return float(radius < alpha)
    slope = 1.0 / math.tan(math.pi * tilt / 2.0)
    return min(max(alpha + slope * (radius - (1.0 - alpha if tilt <= 1.0 else alpha)), 0.0), 1.0)


def crossed(a: list[float], b: list[float], alpha: float, tilt: float) -> list[float]:
    """The crossover of two rows by sums of sines and cosines."""
    size = len(a)
    half = size // 2 + 1
    spectrum: list[complex] = []
    for number in range(size):
        wave = [cmath.exp(-2j * math.pi * number * place / size) for place in range(size)]
        both = [sum(value * turn for value, turn in zip(row, wave, strict=True)) for row in (a, b)]
        share = share_of(min(number, size - number) / max(half - 1, 1), alpha, tilt)
        spectrum.append((1.0 - share) * both[0] + share * both[1])
    return [
        sum(value * cmath.exp(2j * math.pi * number * place / size) for number, value in enumerate(spectrum)).real
        / size
        for place in range(size)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("tilt", [0.0, 0.3, 1.0, 1.6, 2.0, 3.3])
def test_crossovers_follow_the_formula(size: int, tilt: float) -> None:
    a, b, c = drawn(size, count=3)
    due = torch.tensor(crossed(a.tolist(), b.tolist(), 0.37, tilt), dtype=torch.float64)
    assert gap(crossover.on(a, b, alpha=0.37, tilt=tilt), due) < 1e-12
    order = sorted(range(size), key=c.tolist().__getitem__)
    rows = [[tensor.tolist()[place] for place in order] for tensor in (a, b)]
    found = distribution.on(a, b, c, alpha=0.37, tilt=tilt)[order]
    assert gap(found, torch.tensor(crossed(rows[0], rows[1], 0.37, tilt), dtype=torch.float64)) < 1e-12


def test_distributions_are_crossed_in_one_dimension() -> None:
    a, b, c = drawn(6, 5, 2, count=3)
    flat = distribution.on(a.reshape(-1), b.reshape(-1), c.reshape(-1), alpha=0.4, tilt=0.3)
    assert torch.equal(distribution.on(a, b, c, alpha=0.4, tilt=0.3), flat.reshape(6, 5, 2))
    for tensors in (drawn(count=3), drawn(0, 4, count=3)):
        assert gap(distribution.on(*tensors, alpha=0.4), torch.lerp(tensors[0], tensors[1], 0.4)) == 0.0
    assert torch.equal(distribution.on(a, b, c, alpha=7.0), b)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 60), alpha=st.floats(0.0, 1.0), tilt=st.floats(-5.0, 5.0), seed=st.integers(0, 50))
def test_crossovers_are_linear_and_symmetric_in_tilt(size: int, alpha: float, tilt: float, seed: int) -> None:
    a, b, c = drawn(size, count=3, seed=seed)
    for method, operands in ((crossover, (a, b)), (distribution, (a, b, c))):
        found = method.on(*operands, alpha=alpha, tilt=tilt)
        assert gap(method.on(*operands, alpha=alpha, tilt=-tilt), found) < 1e-9
        doubled = method.on(2.0 * a, 2.0 * b, *operands[2:], alpha=alpha, tilt=tilt)
        assert gap(doubled, 2.0 * found) < 1e-9
        assert torch.equal(method.on(a, a, *operands[2:], alpha=alpha, tilt=tilt), a)
        weighted = method.on(*operands, alpha=alpha, tilt=1.0)
        assert gap(weighted, torch.lerp(a, b, alpha)) < 1e-9


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_merge_gives_what_the_methods_give(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    models = [{"w": x, "bias": x[0]} for x in drawn(20, 30, count=3)]
    for method, count in ((crossover, 2), (distribution, 3)):
        recipe = method(*map(rm.model, models[:count]), alpha=0.3, tilt=0.2)
        found = rm.merge(recipe, threads=2, compute_dtype="float64")
        for key in models[0]:
            due = method.on(*(model[key] for model in models[:count]), alpha=0.3, tilt=0.2)
            assert gap(found[key], due) < 1e-13


class TestConformance(MethodConformance):
    @pytest.fixture(params=["crossover", "distribution_crossover"])
    def method(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture(params=[0.0, 0.4, 2.0], ids=str)
    def values(self, request: pytest.FixtureRequest) -> Any:
        return {"tilt": request.param}
