"""Extraction: what two differences have in common, or what only one of them has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remelt.recipe.method import Delta, Mask, Number, merge_method

_LEAST = -1e300
"""The logarithm of 0, such that 0 times it is 0."""


@merge_method(cut="row", vectors="line", limits={"gamma": (0.0, math.inf)}, workspace=7.0)
def extract(a: Delta, b: Delta, *, alpha: Mask = 0.5, beta: Mask = 0.0, gamma: Number = 1.0) -> Delta:
    """A mix of two differences, strong where they point the same way, or where they do not.

    Formula: ((1 - alpha) a + alpha b) ((1 - beta) d + beta (1 - d)), with d = ((1 + s) / 2)^gamma and s the cosine
    between ``a`` and ``b`` along the last dimension; zeros have cosine 0

    Spaces: two deltas give a delta, to be added to their base: ``base + extract(a - base, b - base)``. At ``beta`` 0
    it keeps what both fine-tunes learned, at 1 what only one of them did; ``gamma`` above 1 asks more of what is
    alike. It costs one pass.

    Source: supermerger, "extract", whose model A is the base.

    >>> from torch import tensor
    >>> extract.on(tensor([[1.0, 0.0], [1.0, 0.0]]), tensor([[1.0, 0.0], [0.0, 1.0]]), alpha=0.0)
    tensor([[1.0000, 0.0000],
            [0.5000, 0.0000]])
    """
    likeness = (1.0 + _cosines(a, b)) / 2.0
    if gamma != 1.0:  # not by torch's power, whose bits depend on where in a tensor an element stands
        likeness = (likeness.double().log().clamp(min=_LEAST) * gamma).exp().to(a.dtype)
    mixed: Tensor = torch.lerp(a, b, alpha) * torch.lerp(likeness, 1.0 - likeness, beta)
    return mixed


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of each row of two matrices; 0 where one has no direction."""
    x, y = a.double(), b.double()
    aa, bb, ab = ((one * other).sum(1, keepdim=True) for one, other in ((x, x), (y, y), (x, y)))
    norms = aa.sqrt() * bb.sqrt()
    cosines: Tensor = torch.where(norms == 0.0, 0.0, ab / norms).clamp(-1.0, 1.0).to(a.dtype)
    return cosines
