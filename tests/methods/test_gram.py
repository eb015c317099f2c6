"""Products and distances of several operands, and the mixtures that are made of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remelt.methods import gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_products_and_distances_are_those_of_float64(
    count: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    models = [torch.randn(7, 31, generator=generator, dtype=dtype) for _ in range(count)]
    flat = torch.stack([model.double().flatten() for model in models])
    products = gram.matrix({name: float(value) for name, value in gram.dots(*models).items()}, "dot", count)
    np.testing.assert_allclose(products, (flat @ flat.T).numpy(), rtol=1e-13, atol=1e-12)
    squares = gram.matrix({name: float(value) for name, value in gram.distances(*models).items()}, "apart", count)
    np.testing.assert_allclose(squares, torch.cdist(flat, flat).square().numpy(), rtol=1e-12, atol=1e-12)


def test_distances_of_models_that_are_close_lose_nothing() -> None:
    a = torch.ones(1000, dtype=torch.float64)
    assert gram.distances(a, a + 2.0**-40)["apart0_1"].item() == pytest.approx(1000 * 2.0**-80, rel=1e-13)


def test_cosines_are_of_directions_alone() -> None:
    products = np.array([[1e-40, 1e-20, 0.0], [1e-20, 4.0, 0.0], [0.0, 0.0, 0.0]])
    norms, cosines = gram.norms_and_cosines(products)
    np.testing.assert_allclose(norms, [1e-20, 2.0, 0.0])
    np.testing.assert_allclose(cosines, [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_fractions_add_up_to_one(weights: list[float]) -> None:
    found = gram.fractions(weights)
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1.0, abs=1e-3 if abs(sum(weights)) < 1e-9 * max(map(abs, weights)) else 1e-6)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (0.3, -0.1, -0.2), (float("inf"), 1.0), (float("nan"),)])
def test_weights_that_are_no_fractions_are_equal(weights: tuple[float, ...]) -> None:
    assert gram.fractions(weights).tolist() == [1.0 / len(weights)] * len(weights)


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mixture_is_the_sum_of_its_shares(near: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    models = [torch.randn(131, generator=generator, dtype=dtype) for _ in range(4)]
    shares = np.array([0.5, -0.25, 3.0, 0.125])
    numbers = gram.mixture(shares, shares, near=near)
    due = sum(float(share) * model for share, model in zip(shares, models, strict=True))
    torch.testing.assert_close(gram.mixed(models, numbers), due, rtol=1e-5, atol=1e-5)
    for one, other in itertools.pairwise(models):
        assert one.data_ptr() != other.data_ptr()


def test_a_mixture_of_equal_models_has_their_bits(generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float64):
        model = torch.randn(1000, generator=generator, dtype=dtype)
        numbers = gram.mixture(np.full(7, 1.0 / 7.0 + 1e-16), np.full(7, 1.0), near=True)
        assert torch.equal(gram.mixed([model] * 7, numbers), model)


def test_shares_that_are_not_finite_are_replaced() -> None:
    assert gram.mixture(np.array([np.nan, 1.0]), np.array([0.25, 0.75]), near=False) == {
        "start": 0.25,
        "near": 0.0,
        "way1": 0.75,
    }
