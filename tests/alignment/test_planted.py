"""Permutations that are planted in models of every known arch, with noise on top, are found again exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from remelt.alignment.instances import INSTANCES
from remelt.alignment.matching import match
from remelt.alignment.permutation import permuted, random_permutation
from remelt.alignment.weights import TensorWeights
from remelt.archs.axes.find import axis_groups

WIDTH = 64
"""The least width of streams; heads and hidden channels follow from it."""
LARGE = {"sd1", "sd2", "sdxl", "sdxl_refiner"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in INSTANCES]
)
def test_a_permuted_copy_with_half_as_much_noise_is_undone(name: str) -> None:
    instance = INSTANCES[name](width=WIDTH)
    groups = axis_groups(instance.arch, instance.shapes, instance.heads)
    free = [group for group in groups if not group.is_fixed]
    generator, noise = np.random.default_rng(1), torch.Generator().manual_seed(1)
    tensors = {key: one.float() for key, one in instance.tensors.items() if one.is_floating_point()}
    hidden = {group.name: random_permutation(group, generator) for group in free}
    model = {
        key: one + 0.5 * (one.std() if one.numel() > 1 else 0.0) * torch.randn(one.shape, generator=noise)
        for key, one in permuted(tensors, hidden.values()).items()
    }
    found = match(TensorWeights(tensors), TensorWeights(model), groups, crossing=True)
    assert set(found.permutations) == set(hidden)
    assert [name for name, one in found.permutations.items() if not one.after(hidden[name]).is_identity] == []
    assert found.after > found.before
