"""Fusion: a fine-tune taken over where its changes matter."""

from __future__ import annotations

import torch
from torch import Tensor

from remelt.recipe.method import Weight, merge_method

_ROUNDED = 1e-8
"""What mergekit adds to each probability, so that none is 0."""
_BLOCK = 2**14
"""Elements whose importance is found at a time."""


@merge_method(cut="tensor", workspace=8.0)
def arcee_fusion(base: Weight, tuned: Weight) -> Weight:
    """Take over those changes of a fine-tune that are important.

    Formula: base + (tuned - base) where i >= median(i) + 1.5 (q3 - q1), else base, with the importance i = |tuned -
    base| KL(softmax(tuned) || softmax(base)) by rows of the last dimension, and the median and the quartiles over the
    whole tensor, each an element: that at floor(q (n - 1)) in order, counted from 0.

    Spaces: two weights give a weight. For a base that is to be changed as little as possible: about a tenth of the
    elements pass. Whole tensors are needed, for rows within them and their quartiles.

    Source: Arcee Fusion of mergekit, where the quartiles of more than a million elements are of a random sample.

    >>> from torch import tensor
    >>> arcee_fusion.on(tensor([1.0, 1.0, 1.0, 1.0]), tensor([1.0, 1.1, 1.1, 3.0]))
    tensor([1., 1., 1., 3.])
    """
    if not base.numel():
        return base.clone()
    importance = _importance(base, tuned)
    flat = importance.reshape(-1)
    quarter, half, three_quarters = (
        float(flat.kthvalue(int(share * (flat.numel() - 1)) + 1).values) for share in (0.25, 0.5, 0.75)
    )
    return torch.where(importance >= half + 1.5 * (three_quarters - quarter), tuned, base)


def _importance(base: Tensor, tuned: Tensor) -> Tensor:
    """The importance of each change, found in float64 a few rows at a time: where they are alike, little is left."""
    width = base.shape[-1] if base.dim() else 1
    found = torch.empty_like(base).reshape(-1, width)
    step = max(_BLOCK // width, 1)
    for begin in range(0, len(found), step):
        before, after = (one.reshape(-1, width)[begin : begin + step].double() for one in (base, tuned))
        p, q = (one.softmax(1) + _ROUNDED for one in (after, before))
        divergence = (p * (p / q).log()).sum(1, keepdim=True)
        found[begin : begin + step] = (after - before).abs() * divergence
    return found.reshape(base.shape)
