"""Consensus: what several fine-tunes of one model agree on."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remelt.recipe.method import Bindings, Delta, Flag, Number, Sums, merge_method

_BINS = 2**16


def _magnitudes(delta: Tensor) -> Tensor:
    """The bits of float32 magnitudes, which are in the order of the magnitudes."""
    return delta.reshape(-1).float().abs().view(torch.int32)


def coarse_histograms(*models: Tensor) -> Mapping[str, Tensor]:
    """For each model, how many magnitudes have each of the upper halves of float32's bits."""
    return {
        f"coarse{place}": torch.bincount(_magnitudes(model) >> 16, minlength=_BINS).double()
        for place, model in enumerate(models)
    }


def fine_histograms(*models: Tensor, k: float, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same for the lower halves, of those magnitudes whose upper half the threshold has."""
    found = {}
    for place, model in enumerate(models):
        upper, _ = _rank(sums[f"coarse{place}"], _cut(sums[f"coarse{place}"], k))
        bits = _magnitudes(model)
        found[f"fine{place}"] = torch.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=_BINS).double()
    return found


def thresholds(sums: Mapping[str, Any], *, k: float) -> Mapping[str, float]:
    """The least magnitude of each model that is kept: that of the largest share ``k``; none where all are."""
    found: dict[str, float] = defaultdict(float)
    for name, coarse in sums.items():
        if k < 1.0 and name.startswith("coarse") and bool(coarse.any()):
            upper, rank = _rank(coarse, _cut(coarse, k))
            lower, _ = _rank(sums[name.replace("coarse", "fine")], rank)
            bits = torch.tensor(upper << 16 | lower, dtype=torch.int32)
            found[name.replace("coarse", "threshold")] = float(bits.view(torch.float32))
    return found


def _cut(histogram: Tensor, k: float) -> int:
    """Which magnitude, counted from the least, is the first to be kept."""
    return max(int((1.0 - k) * int(histogram.sum())), 1)


def _rank(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the element of that rank, counted from 1, and its rank within the bin."""
    totals = histogram.cumsum(0)
    place = min(int(torch.searchsorted(totals, torch.tensor(float(rank), dtype=totals.dtype))), len(totals) - 1)
    return place, rank - int(totals[place] - histogram[place])


def _trims(values: Bindings) -> bool:
    k = values.get("k")
    return not isinstance(k, float) or k < 1.0


@merge_method(
    cut="element",
    reductions=(coarse_histograms, fine_histograms),
    reduces=_trims,
    conclusion=thresholds,
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
        return torch.where(models[place].abs() >= sums[f"threshold{place}"], models[place], 0.0)

    def vote(place: int) -> Tensor:
        return kept(place) if vote_sgn else kept(place).sign()

    elected = functools.reduce(lambda votes, place: votes + vote(place), range(1, len(models)), vote(0)).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for place in range(len(models)):
        delta = kept(place)
        agrees = delta.sign() == elected
        total = total + torch.where(agrees, delta, 0.0)
        count = count + torch.where(agrees, torch.ones_like(delta), 0.0)
    return torch.where(count > 0.0, total / count, 0.0)
