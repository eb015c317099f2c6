"""Noise: normal, different from place to place, and the same on every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import remelt as rm
from remelt.methods import METHODS
from remelt.testing import MethodConformance

add_noise = METHODS["add_noise"]


def drawn(size: int = 200_000, **values: Any) -> torch.Tensor:
    found: torch.Tensor = rm.merge(add_noise(rm.model({"w": torch.zeros(size)}), alpha=1.0, **values))["w"]
    return found


def test_it_is_normal() -> None:
    noise = drawn().double()
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1.0) < 0.01
    for deviations, share in ((1.0, 0.6827), (2.0, 0.9545), (3.0, 0.9973)):
        assert abs(float((noise.abs() < deviations).double().mean()) - share) < 0.004
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.01


def test_it_differs_by_seed_key_and_model_and_not_by_run() -> None:
    assert torch.equal(drawn(100), drawn(100))
    assert not torch.equal(drawn(100), drawn(100, seed=1))
    model = {"v": torch.zeros(100), "w": torch.zeros(100)}
    a, b = rm.model(model), rm.model({key: value.clone() for key, value in model.items()})
    found = rm.merge(add_noise(a, alpha=1.0) - add_noise(b, alpha=1.0))
    assert not torch.equal(found["v"], found["w"])
    assert bool((found["w"] != 0.0).all())


def test_at_0_the_model_stays_as_it_is() -> None:
    model = {"w": torch.randn(10)}
    assert torch.equal(rm.merge(add_noise(rm.model(model), alpha=0.0))["w"], model["w"])


class TestConformance(MethodConformance):
    @pytest.fixture
    def method(self) -> Any:
        return add_noise
