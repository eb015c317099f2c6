"""Consensus: what several fine-tunes of one model agree on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from remelt.methods.selection import HELD, SELECTION, thresholds
from remelt.recipe.method import Bindings, Delta, Flag, Numbers, Sums, merge_method


def _trims(values: Bindings) -> bool:
    k = values.get("k")
    return not isinstance(k, tuple) or any(not isinstance(share, float) or share < 1.0 for share in k)


@merge_method(
    cut="element",
    reductions=SELECTION,
    reduces=_trims,
    conclusion=thresholds,
    held=HELD,
    workspace=8.0,
)
def ties_sum(
    *models: Delta,
    k: Numbers = 1.0,
    weights: Numbers = 1.0,
    vote_sgn: Flag = False,
    normalize: Flag = True,
    sums: Sums,
) -> Delta:
    """The mean of those deltas, element by element, whose sign most of them have.

    Formula: each delta keeps the share ``k`` of its elements that are largest in magnitude, the rest become 0, and is
    multiplied by its weight; the sign with the most votes is elected, counted by models, or with ``vote_sgn`` by the
    sum of the deltas; those deltas that have it are added up, and with ``normalize`` divided by the sum of their
    weights.

    Spaces: deltas give a delta, to be added to the model that they are deltas of. ``k`` and ``weights`` are one number
    for all, or a list of one for each.

    Source: TIES-Merging (Yadav et al. 2023, arXiv 2306.01708); as in sd-mecha, whose ``vote_sgn`` is meant here too;
    weights and ``normalize`` as in mergekit.

    >>> from torch import tensor
    >>> ties_sum.on(tensor([1.0, -1.0]), tensor([3.0, 2.0]), tensor([-4.0, 4.0]))
    tensor([2., 3.])
    """

    def kept(place: int) -> Tensor:
        threshold, weight = sums[f"threshold{place}"], weights[place]
        delta = models[place]
        if type(threshold) is not float or threshold:  # else all are kept
            delta = torch.where(delta.float().abs() >= threshold, delta, 0.0)  # as they were counted
        return delta if type(weight) is float and weight == 1.0 else delta * weight

    def vote(place: int) -> Tensor:
        return kept(place) if vote_sgn else kept(place).sign()

    elected = functools.reduce(lambda votes, place: votes + vote(place), range(1, len(models)), vote(0)).sign()
    agreeing = [kept(place).sign() == elected for place in range(len(models))]
    total = functools.reduce(
        torch.add, [torch.where(agrees, kept(place), 0.0) for place, agrees in enumerate(agreeing)]
    )
    if not normalize:
        return total
    count = functools.reduce(
        torch.add, [_counted(agrees, weights[place], total) for place, agrees in enumerate(agreeing)]
    )
    return torch.where(count == 0.0, total, total / count)


def _counted(agrees: Tensor, weight: float, like: Tensor) -> Tensor:
    """A weight where a model agrees, else 0."""
    ones = agrees.to(like.dtype)
    return ones if type(weight) is float and weight == 1.0 else ones * weight
