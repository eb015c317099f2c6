"""Differences that are taken out of a model, or mixed by their squares, as meh does."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from remelt.recipe.method import Number, Same, Sums, merge_method

_LEAST = 1e-6
"""What a share is kept from being nothing by."""


@merge_method(cut="element", spreads=True, workspace=3.0)
def weighted_subtraction(a: Same, b: Same, *, alpha: Number, beta: Number) -> Same:
    """Take a share of one model out of another, and make up for what is missing then.

    Formula: (a - s b) / (1 - s), with s = alpha beta; an s within 0.000001 of 1 counts as so much less.

    Spaces: two weights or two deltas give the same. It undoes a weighted sum: where a = (1 - s) x + s b it gives x. It
    costs one pass.

    Source: meh (s1dlx), weighted_subtraction.

    >>> from torch import tensor
    >>> weighted_subtraction.on(tensor([3.0]), tensor([1.0]), alpha=0.5, beta=1.0)
    tensor([5.])
    """
    left = 1.0 - alpha * beta
    if type(left) is float and abs(left) < _LEAST:
        left = _LEAST
    taken: Tensor = (a - b * (1.0 - left)) / left
    return taken


def products_of_differences(a: Tensor, b: Tensor, c: Tensor) -> Mapping[str, Tensor]:
    """Partial sums of a tile: the products of both differences to ``c``, in float64."""
    x, y, z = a.double().flatten(), b.double().flatten(), c.double().flatten()
    one, other = x - z, y - z
    return {"aa": (one * one).sum(), "bb": (other * other).sum(), "ab": (one * other).sum()}


def euclidean(sums: Mapping[str, float], *, alpha: float) -> Mapping[str, float]:
    """What the squares of both differences are multiplied by, which then add up to that of their mean."""
    share = min(max(alpha, 0.0), 1.0)
    aa, bb = max(sums["aa"], 0.0), max(sums["bb"], 0.0)
    square = (1.0 - share) ** 2 * aa + share**2 * bb + 2.0 * share * (1.0 - share) * sums["ab"]
    met = (1.0 - share) * (aa > 0.0) + share * (bb > 0.0)
    factor = max(square, 0.0) / met if met > 0.0 else 0.0
    found = {
        "share": share,
        "a": factor * (1.0 - share) / aa if aa > 0.0 else 0.0,
        "b": factor * share / bb if bb > 0.0 else 0.0,
    }
    return found if all(map(math.isfinite, found.values())) else {"share": share, "a": math.nan, "b": math.nan}


@merge_method(cut="element", reductions=(products_of_differences,), conclusion=euclidean, workspace=6.0)
def euclidean_add_difference(a: Same, b: Same, c: Same, *, alpha: Number = 0.5, sums: Sums) -> Same:
    """Add the mean of two differences by their squares: large changes of either stay large.

    Formula: c + sign(m) |m| sqrt((1 - alpha) u^2 + alpha v^2) / n, with u = (a - c) / |a - c|, v = (b - c) / |b - c|,
    m = (1 - alpha) (a - c) + alpha (b - c), |m| its norm over the tensor, sign(m) that of each element, 1 where it is
    0, and n the norm of the root. ``alpha`` counts as 0 below 0, and as 1 above 1.

    Spaces: three weights or three deltas give the same. The result is as far from ``c`` as the mean of both would be.
    One pass sums up products.

    Source: meh (s1dlx), euclidean_add_difference.

    >>> from torch import tensor
    >>> euclidean_add_difference.on(tensor([2.0, 0.0]), tensor([0.0, 2.0]), tensor([0.0, 0.0]), alpha=0.5)
    tensor([1., 1.])
    """
    one, other = a - c, b - c
    root = (one * one * sums["a"] + other * other * sums["b"]).sqrt()
    mean = one + (other - one) * sums["share"]
    return c + torch.where(mean < 0.0, -root, root)
