"""Fusion: a fine-tune taken over where its changes matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remelt.methods.selection import HELD, counted_whole, magnitudes_at
from remelt.recipe.method import ELEMENTS, Sums, Weight, merge_method

_ROUNDED = 1e-8
"""What mergekit adds to each probability, so that none is 0."""
_QUARTILES = (0.25, 0.5, 0.75)


def importance(base: Tensor, tuned: Tensor) -> Tensor:
    """The importance of each change, found in float64, as where rows are alike little is left; in float32."""
    before, after = base.double(), tuned.double()
    p, q = (one.softmax(1) + _ROUNDED for one in (after, before))
    divergence = (p * (p / q).log()).sum(1, keepdim=True)
    return ((after - before).abs() * divergence).float()


def _of_quartiles(base: Tensor, tuned: Tensor) -> list[Tensor]:
    return [importance(base, tuned)] * len(_QUARTILES)


def least(sums: Mapping[str, Any]) -> Mapping[str, float]:
    """The least importance that is enough, beside what the rounds ask each other."""
    last = max(int(sums.get(ELEMENTS, 1)) - 1, 0)
    found = magnitudes_at(sums, _QUARTILES, [int(share * last) + 1 for share in _QUARTILES])
    quarter, half, three_quarters = (found[f"threshold{place}"] for place in range(len(_QUARTILES)))
    return {**found, "least": half + 1.5 * (three_quarters - quarter)}


@merge_method(
    cut="row",
    reductions=counted_whole(_of_quartiles),
    conclusion=least,
    held=len(_QUARTILES) * HELD,
    workspace=16.0,
)
def arcee_fusion(base: Weight, tuned: Weight, *, sums: Sums) -> Weight:
    """Take over those changes of a fine-tune that are important.

    Formula: base + (tuned - base) where i >= median(i) + 1.5 (q3 - q1), else base, with the importance i = |tuned -
    base| KL(softmax(tuned) || softmax(base)) by rows, and the median and the quartiles over the whole tensor, each an
    element: that at floor(q (n - 1)) in order, counted from 0. A row is the first dimension's; a tensor of one
    dimension is one row.

    Spaces: two weights give a weight. For a base that is to be changed as little as possible: about a tenth of the
    elements pass. The quartiles are exact; both tensors are read three times.

    Source: Arcee Fusion of mergekit, where the quartiles of more than a million elements are of a random sample, and
    a row of a convolution's kernel is one of its lines.

    >>> from torch import tensor
    >>> arcee_fusion.on(tensor([1.0, 1.0, 1.0, 1.0]), tensor([1.0, 1.1, 1.1, 3.0]))
    tensor([1., 1., 1., 3.])
    """
    return torch.where(importance(base, tuned) >= sums["least"], tuned, base)
