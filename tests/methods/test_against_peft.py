"""PEFT's ways to merge task vectors, which work on lists of tensors: the same formulas, held against each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from remelt.core.random import Random
from remelt.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
SHAPES = ((257,), (64, 65), (3, 4, 5))
WEIGHTS = ([1.0, 1.0, 1.0], [0.5, 0.3, 1.2], [2.0, -0.5, 0.25])


def deltas(shape: tuple[int, ...]) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=drawn) for _ in range(3)]


def cases() -> Iterator[tuple[list[Tensor], list[float]]]:
    for shape in SHAPES:
        for weights in WEIGHTS:
            yield deltas(shape), weights


@pytest.fixture
def peft() -> object:
    return pytest.importorskip("peft.utils.merge_utils")


def weighted(models: list[Tensor], weights: list[float]) -> list[Tensor]:
    return [model * weight for model, weight in zip(models, weights, strict=True)]


def test_task_arithmetic(peft: object) -> None:
    for models, weights in cases():
        due = peft.task_arithmetic(models, torch.tensor(weights))  # type: ignore[attr-defined]
        zero = torch.zeros_like(models[0])
        found = METHODS["task_arithmetic"].on(zero, *models, weights=tuple(weights))
        torch.testing.assert_close(found, due, rtol=1e-6, atol=1e-6)


def test_magnitude_pruning_is_trimming(peft: object) -> None:
    """PEFT keeps ``int(density n)`` elements; remelt the one more that has the threshold's magnitude."""
    for models, _ in cases():
        for density in (0.1, 0.25, 0.5, 0.8, 1.0):
            due = peft.prune(models[0], density, method="magnitude")  # type: ignore[attr-defined]
            found = METHODS["trim"].on(models[0], k=density)
            kept, wanted = int((found != 0.0).sum()), int((due != 0.0).sum())
            assert wanted <= kept <= wanted + 2
            both = due != 0.0
            assert torch.equal(found[both], due[both])
            assert (found[~both].abs() <= due[both].abs().min()).all()


def test_ties_of_all_elements(peft: object) -> None:
    """Where deltas have the elected sign they count in PEFT's mean with a weight of 1, in remelt's with their own."""
    for models, _ in cases():
        ones = [1.0] * len(models)
        due = peft.ties(models, torch.tensor(ones), 1.0, "total")  # type: ignore[attr-defined]
        found = METHODS["ties"].on(*models)
        torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-6)


def test_ties_of_weighted_deltas(peft: object) -> None:
    """PEFT elects signs before it weighs and divides by how many agree; remelt weighs first, divides by the weights."""
    models, weights = deltas((64, 65)), [0.5, 0.3, 1.2]
    due = peft.ties(models, torch.tensor(weights), 1.0, "total")  # type: ignore[attr-defined]
    scaled = weighted(models, weights)
    total = METHODS["ties"].on(*models, weights=tuple(weights), normalize=False)
    elected = sum(scaled).sign()  # type: ignore[union-attr]
    agreeing = sum((one.sign() == elected).float() for one in scaled)
    same = elected == sum(models).sign()  # type: ignore[union-attr]
    assert same.float().mean() > 0.7
    torch.testing.assert_close((total / agreeing)[same], due[same], rtol=1e-5, atol=1e-6)


def test_ties_by_count(peft: object) -> None:
    for models, _ in cases():
        mask = peft.calculate_majority_sign_mask(torch.stack(models), "frequency")  # type: ignore[attr-defined]
        due = peft.disjoint_merge(torch.stack(models), mask)  # type: ignore[attr-defined]
        found = METHODS["ties_by_count"].on(*models)
        torch.testing.assert_close(found, due, rtol=1e-5, atol=1e-6)


def test_random_pruning_keeps_and_enlarges_as_dare_does(peft: object) -> None:
    torch.manual_seed(0)
    delta = torch.ones(40_000)
    due = peft.prune(delta, 0.3, method="random", rescale=True)  # type: ignore[attr-defined]
    found = METHODS["dare"].on(delta, density=0.3, random=Random(0, "dare", "x", 0, delta.numel()))
    assert set(found.unique().tolist()) == set(due.unique().tolist())
    for one in (found, due):
        assert abs(int((one != 0.0).sum()) - 12_000) < 5 * (40_000 * 0.3 * 0.7) ** 0.5
