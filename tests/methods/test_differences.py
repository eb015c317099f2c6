"""Differences as meh takes them, held against slow transcriptions of its formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import remelt as rm
from remelt.engine import native
from remelt.methods import METHODS
from remelt.testing import MethodConformance

NAMES = ("weighted_subtraction", "euclidean_add_difference")


@pytest.mark.parametrize("name", NAMES)
class TestConformance(MethodConformance):
    @pytest.fixture
    def method(self, name: str) -> str:
        return name


def cases(count: int) -> Iterator[list[Tensor]]:
    for dtype in (torch.float32, torch.float64):
        for shape in ((), (0,), (1,), (7,), (33, 17), (4, 3, 3, 3)):
            drawn = torch.Generator().manual_seed(len(shape))
            yield [torch.randn(shape, generator=drawn, dtype=torch.float64).to(dtype) for _ in range(count)]
    yield [torch.zeros(5) for _ in range(count)]
    yield [torch.full((5,), 2.0) for _ in range(count)]
    yield [torch.randn(9, generator=torch.Generator().manual_seed(place)) * 1e-6 for place in range(count)]


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.5, 0.5), (1.0, 0.9), (-0.5, 1.0)])
def test_what_is_subtracted_is_made_up_for(alpha: float, beta: float) -> None:
    for a, b in cases(2):
        found = METHODS["weighted_subtraction"].on(a, b, alpha=alpha, beta=beta)
        share = alpha * beta
        due = ((a.double() - share * b.double()) / (1.0 - share)).to(a.dtype)
        torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-6 * float(b.abs().max() if b.numel() else 0.0))


def test_all_of_a_model_is_never_taken_out() -> None:
    found = METHODS["weighted_subtraction"].on(torch.tensor([3.0]), torch.tensor([1.0]), alpha=1.0, beta=1.0)
    torch.testing.assert_close(found, torch.tensor([2.0e6]), rtol=1e-3, atol=0.0)


def test_a_weighted_sum_is_undone() -> None:
    for x, b in cases(2):
        mixed = torch.lerp(x.double(), b.double(), 0.3)
        torch.testing.assert_close(
            METHODS["weighted_subtraction"].on(mixed, b.double(), alpha=0.3, beta=1.0), x.double()
        )


def by_meh(a: Tensor, b: Tensor, c: Tensor, alpha: float) -> Tensor:
    one, other = a.double() - c.double(), b.double() - c.double()
    u = torch.nan_to_num(one / torch.linalg.norm(one))
    v = torch.nan_to_num(other / torch.linalg.norm(other))
    root = torch.sqrt((1 - alpha) * u**2 + alpha * v**2)
    mean = torch.lerp(a.double(), b.double(), alpha) - c.double()
    away = torch.copysign(root, mean) / torch.linalg.norm(root) * torch.linalg.norm(mean)
    return (c.double() + torch.nan_to_num(away)).to(a.dtype)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_differences_are_mixed_by_their_squares(alpha: float) -> None:
    for a, b, c in cases(3):
        found = METHODS["euclidean_add_difference"].on(a, b, c, alpha=alpha)
        torch.testing.assert_close(
            found, by_meh(a, b, c, alpha), rtol=1e-5, atol=1e-6 * float(a.abs().max() if a.numel() else 0.0)
        )


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_they_run_in_the_engine(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if executor == "native" and not native.available():
        pytest.skip("the native executor is not built")
    monkeypatch.setenv("REMELT_EXECUTOR", executor)
    a, b, c = (torch.randn(300_001, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    models = [rm.model({"w": tensor}) for tensor in (a, b, c)]
    found = rm.merge(METHODS["euclidean_add_difference"](*models, alpha=0.3))["w"]
    torch.testing.assert_close(found, by_meh(a, b, c, 0.3))
    found = rm.merge(METHODS["weighted_subtraction"](*models[:2], alpha=0.3, beta=0.5))["w"]
    torch.testing.assert_close(found, (a - 0.15 * b) / 0.85)
