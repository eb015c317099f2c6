"""Consensus: what several fine-tunes of one model agree on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from remelt.methods.selection import HELD, SELECTION, thresholds
from remelt.recipe.method import Bindings, Delta, Flag, Number, Sums, merge_method


def _trims(values: Bindings) -> bool:
    k = values.get("k")
    return not isinstance(k, float) or k < 1.0


@merge_method(
    cut="element",
    reductions=SELECTION,
    reduces=_trims,
    conclusion=thresholds,
    held=HELD,
    workspace=8.0,
)
def ties_sum(*models: Delta, k: Number = 1.0, vote_sgn: Flag = False, sums: Sums) -> Delta:
    """The mean of those deltas, element by element, whose sign most of them have.

    Formula: each delta keeps the share ``k`` of its elements that are largest in magnitude, the rest become 0; the
    sign with the most votes is elected, counted by models, or with ``vote_sgn`` by the sum of the deltas; those deltas
    that have it are averaged.

    Spaces: deltas give a delta, to be added to the model that they are deltas of.

    Source: TIES-Merging (Yadav et al. 2023, arXiv 2306.01708); as in sd-mecha, whose ``vote_sgn`` is meant here too.

    >>> from torch import tensor
    >>> ties_sum.on(tensor([1.0, -1.0]), tensor([3.0, 2.0]), tensor([-4.0, 4.0]))
    tensor([2., 3.])
    """

    def kept(place: int) -> Tensor:
        threshold = sums[f"threshold{place}"]
        if type(threshold) is float and not threshold:  # all are kept
            return models[place]
        return torch.where(models[place].abs() >= threshold, models[place], 0.0)

    def vote(place: int) -> Tensor:
        return kept(place) if vote_sgn else kept(place).sign()

    elected = functools.reduce(lambda votes, place: votes + vote(place), range(1, len(models)), vote(0)).sign()
    agreeing = [kept(place).sign() == elected for place in range(len(models))]
    total = functools.reduce(
        torch.add, [torch.where(agrees, kept(place), 0.0) for place, agrees in enumerate(agreeing)]
    )
    count = functools.reduce(torch.add, [agrees.to(total.dtype) for agrees in agreeing])
    return torch.where(count > 0.0, total / count, 0.0)
