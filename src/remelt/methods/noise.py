"""Noise: random numbers added to a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remelt.core.random import Random
from remelt.recipe.method import Integer, Mask, Same, Shortcut, merge_method


@merge_method(cut="element", shortcuts=(Shortcut("alpha", 0.0, "a"),), workspace=10.0)
def add_noise(a: Same, *, alpha: Mask = 0.001, seed: Integer = 0, random: Random) -> Same:
    """Add normal noise to a model.

    Formula: a + alpha z, with z drawn for each element from the normal distribution of mean 0 and deviation 1

    Spaces: a weight gives a weight, a delta a delta. ``alpha`` may differ by block. To see how much a layer can take,
    or to begin a search from more than one place. The numbers differ by seed, key and element, and from call to call in
    a recipe. It costs one pass and two random numbers for each element, which take longer than a weighted sum.

    Source: supermerger, "plus random"; drawn by the transform of Box and Muller 1958.

    >>> from torch import tensor
    >>> from remelt.core.random import Random
    >>> drawn = Random(seed=0, method="add_noise", key="w", offset=0, size=2)
    >>> add_noise.on(tensor([1.0, 2.0]), alpha=0.0, random=drawn)
    tensor([1., 2.])
    """
    length, turn = (torch.from_numpy(random.uniform(stream)) for stream in (0, 1))
    normal: Tensor = (-2.0 * (1.0 - length).log()).sqrt() * (2.0 * math.pi * turn).cos()
    noisy: Tensor = a + alpha * normal.to(a).reshape(a.shape)
    return noisy
