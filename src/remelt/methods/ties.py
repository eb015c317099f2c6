"""TIES: deltas trimmed, a sign elected for each element, and those that have it combined."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remelt.methods.consensus import TRIMMED, elected_sign, trimmed_consensus
from remelt.methods.gram import distances, mixed
from remelt.methods.several import model_stock_rows, nearest_to_all
from remelt.recipe.method import Delta, Flag, Numbers, Sums, Text, merge_method

_OVER = {"trim": ("tensor", "model")}
_STEPS, _SETTLED, _NEAREST = 100, 1e-14, 1e-6
"""How a geometric median is found: as `geometric_median` does by default."""


@merge_method(**TRIMMED, limits=_OVER)
def ties(
    *deltas: Delta,
    k: Numbers = 1.0,
    weights: Numbers = 1.0,
    trim: Text = "tensor",
    normalize: Flag = True,
    sums: Sums,
) -> Delta:
    """The mean of those deltas, element by element, that have the sign of the sum of all: TIES-Merging.

    Formula: each delta keeps the share ``k`` of its elements that are largest in magnitude, as `trim` does, and is
    multiplied by its weight; the sign of their sum is elected; those deltas that have it are added up, and with
    ``normalize`` divided by the sum of their weights. Where the sum is 0 none is elected, and the result is 0.

    Spaces: deltas give a delta, to be added to the model that they are deltas of. ``k`` and ``weights`` are one number
    for all, or a list of one for each. For several fine-tunes that pull the same weights in different ways; an
    element's largest changes decide its sign. With ``k`` below 1 it costs one more pass over each tensor; with ``trim``
    "model" two, as the share is of all elements of the model then, and tensors that hardly changed may lose all.

    Source: TIES-Merging (Yadav et al. 2023, arXiv 2306.01708); weights and ``normalize`` as in mergekit, where a sum of
    0 counts as positive. `ties_sum` with ``vote_sgn`` is the same.

    >>> from torch import tensor
    >>> ties.on(tensor([3.0, -1.0]), tensor([-1.0, 2.0]), tensor([-1.0, 4.0]))
    tensor([3., 3.])
    """
    return trimmed_consensus(deltas, sums, weights, by_mass=True, normalize=normalize)


@merge_method(**TRIMMED, limits=_OVER)
def ties_by_count(
    *deltas: Delta,
    k: Numbers = 1.0,
    weights: Numbers = 1.0,
    trim: Text = "tensor",
    normalize: Flag = True,
    sums: Sums,
) -> Delta:
    """The mean of those deltas, element by element, that have the sign that most of them have.

    Formula: as `ties`, but the sign of the sum of the deltas' signs is elected. Where there are as many for either, the
    result is 0.

    Spaces: deltas give a delta, to be added to the model that they are deltas of. ``k`` and ``weights`` are one number
    for all, or a list of one for each. Where every model shall have one vote, however far it went. ``trim`` and the
    cost are as there.

    Source: the ``count`` consensus of mergekit; sd-mecha's ``ties_sum`` by default, which is `ties_sum` here too.

    >>> from torch import tensor
    >>> ties_by_count.on(tensor([3.0, -1.0]), tensor([-1.0, 2.0]), tensor([-1.0, 4.0]))
    tensor([-1.,  3.])
    """
    return trimmed_consensus(deltas, sums, weights, by_mass=False, normalize=normalize)


@merge_method(cut="row", workspace=14.0)
def ties_with_stock(*deltas: Delta, by_count: Flag = False) -> Delta:
    """The mean of those deltas that have the elected sign, each row as long as they agree in direction.

    Formula: t (sum of the agreeing deltas) / (how many agree), with those that do not agree as 0 in t = n c / (1 +
    (n - 1) c), where c is the mean of the cosines between all pairs of rows, 0 where a row is 0. The sign is elected by
    the sum, or with ``by_count`` by the number of deltas. A row is the first dimension's; a tensor of one dimension is
    one row.

    Spaces: deltas give a delta. Like `ties` of deltas that `trim` made, drawn back to the base where they have little
    in common: t is 1 for equal deltas and for one alone, 0 for such as never meet. Whole rows are read at a time.

    Source: sd-mecha's ``ties_sum_extended`` with ``apply_stock``; Model Stock (Jang et al. 2024, arXiv 2403.19522).

    >>> from torch import tensor
    >>> ties_with_stock.on(tensor([[2.0, 0.0], [1.0, 1.0]]), tensor([[4.0, 0.0], [1.0, -3.0]]))
    tensor([[ 3.0000,  0.0000],
            [ 0.4805, -1.4415]])
    """
    agreeing = _agreeing(deltas, by_count=by_count)
    count = functools.reduce(torch.add, [(delta != 0.0).to(delta.dtype) for delta in agreeing])
    stock = model_stock_rows.function(*agreeing)  # of the mean of all, those that are 0 included
    return torch.where(count == 0.0, 0.0, stock * (len(deltas) / count))


def _agreeing(deltas: Sequence[Tensor], *, by_count: bool) -> list[Tensor]:
    """The deltas where they have the elected sign, else 0."""
    elected = elected_sign(lambda place: deltas[place].sign() if by_count else deltas[place], len(deltas))
    return [torch.where(delta.sign() == elected, delta, 0.0) for delta in deltas]


def _distances(*deltas: Tensor, by_count: bool = False) -> Mapping[str, Tensor]:
    """Partial sums of a tile: the squared distance of each two of the deltas where they agree."""
    return distances(*_agreeing(deltas, by_count=by_count))


def median_shares(sums: Mapping[str, float]) -> Mapping[str, float]:
    """The shares of the deltas in their geometric median, from their distances."""
    pairs = sum(name.startswith("apart") for name in sums)
    count = (1 + math.isqrt(1 + 8 * pairs)) // 2
    return nearest_to_all(sums, weights=(1.0,) * count, iterations=_STEPS, tolerance=_SETTLED, smoothing=_NEAREST)


@merge_method(cut="element", reductions=(_distances,), conclusion=median_shares, workspace=8.0)
def ties_with_median(*deltas: Delta, by_count: Flag = False, sums: Sums) -> Delta:
    """The geometric median of the deltas, with each of them 0 where it has not the elected sign.

    Formula: the point x that makes |x - d1| + ... + |x - dn| least, over the whole tensor, with d the deltas where they
    have the elected sign, else 0. The sign is elected by the sum, or with ``by_count`` by the number of deltas.

    Spaces: deltas give a delta. Like `ties` of deltas that `trim` made, less moved by one that is far from the others.
    Where a delta disagrees its 0 pulls, too, so that the result is smaller than the mean of those that agree. One pass
    sums up the distances of each two, and the rest is found with these numbers, as in `geometric_median`.

    Source: sd-mecha's ``ties_sum_extended`` with ``apply_median``.

    >>> from torch import tensor
    >>> ties_with_median.on(tensor([2.0, 1.0]), tensor([2.0, 1.0]), tensor([9.0, -1.0])).round(decimals=3)
    tensor([2., 1.])
    """
    return mixed(_agreeing(deltas, by_count=by_count), sums)
