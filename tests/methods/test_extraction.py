"""What two differences have in common: beside supermerger's rule written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import remelt as rm
from remelt.errors import RecipeError
from remelt.methods import METHODS
from remelt.testing import MethodConformance

extract = METHODS["extract"]
SHAPES = ((0,), (0, 4), (4, 0), (1,), (10,), (16, 33), (7, 3, 3, 3), (2, 3, 5))


def drawn(*shape: int, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def by_supermerger(base: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Its rule: differences to the base, mixed, and multiplied by how alike the lines of the last dimension are."""
    one, other = a - base, b - base
    result = torch.empty_like(base)
    for place in torch.cartesian_prod(*map(torch.arange, base.shape[:-1])).reshape(-1, base.dim() - 1).tolist():
        x, y = one[tuple(place)], other[tuple(place)]
        likeness = ((float(x @ y / (x.norm() * y.norm())) + 1) / 2) ** gamma
        factor = likeness + beta * ((1 - likeness) - likeness)
        result[tuple(place)] = base[tuple(place)] + (x + alpha * (y - x)) * factor
    return result


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_it_is_the_extract_of_supermerger(alpha: float, beta: float, gamma: float) -> None:
    for shape in ((16, 33), (7, 3, 3, 3), (2, 3, 5), (9, 1)):
        base, a, b = drawn(*shape, count=3)
        found = base + extract.on(a - base, b - base, alpha=alpha, beta=beta, gamma=gamma)
        torch.testing.assert_close(found, by_supermerger(base, a, b, alpha, beta, gamma), rtol=1e-12, atol=1e-12)


def test_differences_without_a_direction_are_half_alike() -> None:
    a, b = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert extract.on(a, b, alpha=0.0).tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_what_is_common_and_what_is_not_make_up_the_mix() -> None:
    a, b = drawn(6, 5, count=2)
    both = extract.on(a, b, alpha=0.25, gamma=3.0) + extract.on(a, b, alpha=0.25, beta=1.0, gamma=3.0)
    torch.testing.assert_close(both, torch.lerp(a, b, 0.25), rtol=1e-12, atol=1e-12)


def test_an_exponent_below_0_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"extract: gamma is 0 or more, but got -1\.0"):
        base = rm.model({"w": torch.ones(2, 2)})
        rm.merge(base + extract(base - base, base - base, gamma=-1.0))


class TestConformance(MethodConformance):
    @pytest.fixture
    def method(self) -> Any:
        return extract

    @pytest.fixture(params=[{}, {"alpha": 0.2, "beta": 0.7, "gamma": 1.5}], ids=str)
    def values(self, request: pytest.FixtureRequest) -> Any:
        return request.param
