"""Trimming: deltas that keep some of their elements, chosen by magnitude."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remelt.methods.consensus import largest, trim_rounds
from remelt.methods.selection import HELD, SELECTION, magnitudes_at, selection_of, thresholds
from remelt.recipe.method import ELEMENTS, Delta, Number, Shortcut, Sums, Text, merge_method


def threshold(sums: Mapping[str, Any], *, k: float) -> Mapping[str, float]:
    """The least magnitude that is kept."""
    return thresholds(sums, k=(max(k, 0.0),))


@merge_method(
    cut="element",
    reductions=SELECTION,
    reduces=trim_rounds,
    conclusion=threshold,
    shortcuts=(Shortcut("k", 1.0, "delta"),),
    limits={"over": ("tensor", "model")},
    held=HELD,
    workspace=4.0,
)
def trim(delta: Delta, *, k: Number = 1.0, over: Text = "tensor", sums: Sums) -> Delta:
    """The largest elements of a delta; the rest become 0.

    Formula: delta where |delta| >= t, else 0, with t the magnitude at place max(floor((1 - k) n), 1) from below in the
    order of all n magnitudes of the tensor. Elements as large as the threshold are all kept: so at ``k`` 0 the largest
    one is.

    Spaces: a delta gives a delta. Before any method of deltas, where few large changes matter and many small ones only
    add up to noise. The threshold is exact; it costs a sample and one more pass over the tensor. With ``over`` "model"
    the order is that of all tensors of the model, which costs two passes. NaN become 0.

    Source: the first step of TIES-Merging (Yadav et al. 2023, arXiv 2306.01708); ``magnitude`` of mergekit, which keeps
    floor(k n) elements.

    >>> from torch import tensor
    >>> trim.on(tensor([4.0, -1.0, 2.0, -3.0]), k=0.5)
    tensor([ 4.,  0.,  2., -3.])
    """
    return largest(delta, sums["threshold0"])


def _twice(delta: Tensor) -> Sequence[Tensor]:
    return delta, delta


def band(sums: Mapping[str, Any], *, density: float, gamma: float) -> Mapping[str, float]:
    """The least and the greatest magnitude that are kept, and what the rounds that find them ask each other."""
    if density <= 0.0:
        return magnitudes_at(sums, ()) | {"low": math.inf, "high": 0.0}
    size, top = int(sums[ELEMENTS]), max(gamma, 0.0)
    count = max(int(min(density, 1.0) * size), 1)
    bottom = max(size - count - int(top * size), 0)
    low, high = max(1.0 - density - top, 0.0), max(1.0 - top, density)
    found = magnitudes_at(sums, (low, high if top else None), (bottom + 1, bottom + count))
    return found | {"low": found["threshold0"], "high": found["threshold1"] if top else math.inf}


@merge_method(
    cut="element",
    reductions=selection_of(_twice),
    conclusion=band,
    shortcuts=(Shortcut("density", 1.0, "delta"),),
    held=2 * HELD,
    workspace=5.0,
)
def breadcrumbs(delta: Delta, *, density: Number = 0.5, gamma: Number = 0.01, sums: Sums) -> Delta:
    """The middle of a delta: neither its largest elements, which may be outliers, nor its smallest.

    Formula: delta where low <= |delta| <= high, else 0, with low and high the magnitudes at places b + 1 and b + m from
    below in the order of all n magnitudes of the tensor; m = floor(density n) are kept, one at least, b = max(n - m -
    floor(gamma n), 0) smaller ones are dropped, and the share ``gamma`` of the largest: fewer, where ``density`` leaves
    no room. Elements as large as a limit are all kept; at ``density`` 0 or below all is 0.

    Spaces: a delta gives a delta. Before a sum of deltas; where a fine-tune has a few extreme changes. Both limits are
    exact; they cost a sample and one more pass over the tensor. NaN become 0. Nothing is rescaled.

    Source: Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795, with beta = 1 - density - gamma); as in
    mergekit.

    >>> from torch import tensor
    >>> breadcrumbs.on(tensor([40.0, -1.0, 2.0, -3.0]), density=0.5, gamma=0.25)
    tensor([ 0.,  0.,  2., -3.])
    """
    magnitude = delta.float().abs()  # as they were counted
    return torch.where((magnitude >= sums["low"]) & (magnitude <= sums["high"]), delta, 0.0)
