"""Consensus: what several fine-tunes of one model agree on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remelt.methods.selection import ACROSS, HELD, SELECTION, thresholds
from remelt.recipe.method import Bindings, Delta, Flag, Numbers, Reduction, Sums, merge_method


def trims(values: Bindings) -> bool:
    """Whether any delta loses elements: where it is not known that all are kept."""
    k = values.get("k")
    shares = k if isinstance(k, tuple) else (k,)
    return any(not isinstance(share, float) or share < 1.0 for share in shares)


def trim_rounds(values: Bindings) -> bool | Sequence[Reduction]:
    """What finds the thresholds: of each tensor, or with ``trim`` or ``over`` "model" of all tensors together."""
    over = values.get("over" if "over" in values else "trim", "tensor")
    return ACROSS if trims(values) and over == "model" else trims(values)


def largest(delta: Tensor, threshold: float) -> Tensor:
    """Those elements whose magnitude is not below a threshold, the rest 0."""
    if type(threshold) is float and not threshold:
        return delta
    return torch.where(delta.float().abs() >= threshold, delta, 0.0)  # as they were counted


def trimmed_consensus(
    models: Sequence[Tensor], found: Mapping[str, float], weights: Sequence[float], *, by_mass: bool, normalize: bool
) -> Tensor:
    """TIES: deltas trimmed at thresholds, multiplied by weights, and averaged where they have the elected sign."""

    def kept(place: int) -> Tensor:
        weight, delta = weights[place], largest(models[place], found[f"threshold{place}"])
        return delta if type(weight) is float and weight == 1.0 else delta * weight

    def vote(place: int) -> Tensor:
        return kept(place) if by_mass else kept(place).sign()

    return agreed(kept, weights, vote=vote, normalize=normalize)


def agreed(
    kept: Callable[[int], Tensor],
    weights: Sequence[float],
    *,
    vote: Callable[[int], Tensor],
    normalize: bool = True,
) -> Tensor:
    """The sum of those that have the sign of the sum of the votes, divided by the sum of their weights.

    What is kept, and its vote, are asked for by place whenever they are needed: held all at once, they would take
    memory for as many tensors.
    """
    places = range(len(weights))
    elected = elected_sign(vote, len(weights))
    agreeing = [kept(place).sign() == elected for place in places]
    total = functools.reduce(
        torch.add, [torch.where(agrees, kept(place), 0.0) for place, agrees in enumerate(agreeing)]
    )
    if not normalize:
        return total
    count = functools.reduce(
        torch.add, [_counted(agrees, weights[place], total) for place, agrees in enumerate(agreeing)]
    )
    return torch.where(count == 0.0, total, total / count)


def elected_sign(vote: Callable[[int], Tensor], count: int) -> Tensor:
    """The sign of the sum of so many votes; 0 where they cancel out."""
    return functools.reduce(lambda votes, place: votes + vote(place), range(1, count), vote(0)).sign()


def _counted(agrees: Tensor, weight: float, like: Tensor) -> Tensor:
    """A weight where a model agrees, else 0."""
    ones = agrees.to(like.dtype)
    return ones if type(weight) is float and weight == 1.0 else ones * weight


TRIMMED: dict[str, Any] = {
    "cut": "element",
    "reductions": SELECTION,
    "reduces": trim_rounds,
    "conclusion": thresholds,
    "held": HELD,
    "workspace": 8.0,
}
"""What the methods declare that are a `trimmed_consensus`."""


@merge_method(**TRIMMED)
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
    for all, or a list of one for each. For sd-mecha's recipes; `ties` says the same by clearer names. It costs one
    pass, and where ``k`` is below 1 a sample and one more.

    Source: TIES-Merging (Yadav et al. 2023, arXiv 2306.01708); as in sd-mecha, whose ``vote_sgn`` is meant here too;
    weights and ``normalize`` as in mergekit.

    >>> from torch import tensor
    >>> ties_sum.on(tensor([1.0, -1.0]), tensor([3.0, 2.0]), tensor([-4.0, 4.0]))
    tensor([2., 3.])
    """
    return trimmed_consensus(models, sums, weights, by_mass=vote_sgn, normalize=normalize)
