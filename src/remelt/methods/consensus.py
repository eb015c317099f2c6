"""Consensus: what several fine-tunes of one model agree on."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remelt.methods.selection import bin_of_rank, bin_of_share, lower_histogram, magnitude_of, upper_histogram
from remelt.recipe.method import Bindings, Delta, Flag, Number, Sums, merge_method


def upper_histograms(*models: Tensor) -> Mapping[str, Tensor]:
    """For each model, how many magnitudes have each of the upper halves of float32's bits."""
    return {f"coarse{place}": upper_histogram(model) for place, model in enumerate(models)}


def lower_histograms(*models: Tensor, sums: Mapping[str, float]) -> Mapping[str, Tensor]:
    """The same for the lower halves, of those magnitudes whose upper half the threshold has."""
    return {f"fine{place}": lower_histogram(model, sums[f"upper{place}"]) for place, model in enumerate(models)}


def thresholds(sums: Mapping[str, Any], *, k: float) -> Mapping[str, float]:
    """The least magnitude of each model that is kept: that of the largest share ``k``; none where all are.

    After the first histograms, the upper halves of those magnitudes' bits.
    """
    found: dict[str, float] = defaultdict(float)
    for name, coarse in sums.items():
        if not name.startswith("coarse"):
            continue
        place = name.removeprefix("coarse")
        upper, rank = bin_of_share(coarse, 1.0 - k)
        found[f"upper{place}"] = float(upper)
        if k < 1.0 and f"fine{place}" in sums:
            found[f"threshold{place}"] = magnitude_of(upper, bin_of_rank(sums[f"fine{place}"], rank))
    return found


def _trims(values: Bindings) -> bool:
    k = values.get("k")
    return not isinstance(k, float) or k < 1.0


@merge_method(
    cut="element",
    reductions=(upper_histograms, lower_histograms),
    reduces=_trims,
    conclusion=thresholds,
    held=2**19,
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
