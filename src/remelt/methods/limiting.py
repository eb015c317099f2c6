"""Limits: keeping a result within what its inputs span."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from remelt.recipe.method import Number, Same, merge_method


@merge_method(cut="element", workspace=6.0)
def clamp(a: Same, *bounds: Same, stiffness: Number = 0.0) -> Same:
    """Keep ``a`` between the least and the greatest of the bounds, element by element.

    Formula: min(max(a, low), high), with low and high the least and greatest of ``bounds``; ``stiffness`` moves them
    towards the bounds nearest to the bounds' mean.

    Spaces: all operands in one. Keeps a merge from going beyond the models that it is made of. It costs one pass.

    Source: the clamp of sd-mecha, after add-difference clamping in the Stable Diffusion merging tools.

    >>> from torch import tensor
    >>> clamp.on(tensor([5.0, 0.5]), tensor([0.0, 0.0]), tensor([1.0, 1.0]))
    tensor([1.0000, 0.5000])
    """
    high: Tensor = functools.reduce(torch.maximum, bounds)
    low: Tensor = functools.reduce(torch.minimum, bounds)
    if stiffness:
        mean = sum(bounds[1:], start=bounds[0]) / len(bounds)
        inner_high, inner_low = high, low
        for bound in bounds:
            inner_high = torch.where((bound >= mean) & (bound <= inner_high), bound, inner_high)
            inner_low = torch.where((bound <= mean) & (bound >= inner_low), bound, inner_low)
        high = (1.0 - stiffness) * high + stiffness * inner_high
        low = (1.0 - stiffness) * low + stiffness * inner_low
    return torch.minimum(torch.maximum(a, low), high)
