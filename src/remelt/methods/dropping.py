"""Dropping: deltas that keep some of their elements, chosen at random."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from remelt.core.random import Random
from remelt.recipe.method import Delta, Flag, Integer, Number, Shortcut, merge_method


@merge_method(cut="element", shortcuts=(Shortcut("density", 1.0, "delta"),), workspace=8.0)
def dare(delta: Delta, *, density: Number = 0.5, rescale: Flag = True, seed: Integer = 0, random: Random) -> Delta:
    """Elements of a delta kept at random, and enlarged so that their mean stays what it was: DARE.

    Formula: delta / density where u < density, else 0, with u uniform in [0, 1); without ``rescale`` delta where u <
    density, else 0. At ``density`` 0 or below all is 0, at 1 or above nothing changes.

    Spaces: a delta gives a delta. `dare` of each delta in `ties`, or in a sum, is the DARE-TIES or linear DARE of other
    tools. It thins out deltas that are small and redundant, so that those of several models meet less. The numbers u
    differ by seed, key and element, and from call to call in a recipe, so that two models lose different elements. It
    costs one pass and as many random numbers as there are elements, which take longer than a weighted sum.

    Source: DARE (Yu et al. 2023, arXiv 2311.03099). The ``rescale`` of mergekit multiplies by the ratio of the sums of
    magnitudes before and after instead, which is 1 / density but for the luck of the draw.

    >>> from remelt.core.random import Random
    >>> from torch import ones
    >>> dare.on(ones(4), density=0.5, random=Random(seed=0, method="dare", key="w", offset=0, size=4))
    tensor([0., 0., 2., 2.])
    """
    if density >= 1.0:
        return delta.clone()
    kept = torch.from_numpy(random.uniform(0) < density).reshape(delta.shape).to(delta.device)
    return torch.where(kept, delta / density if rescale and density > 0.0 else delta, 0.0)


@merge_method(cut="row", shortcuts=(Shortcut("density", 1.0, "delta"),), workspace=12.0)
def della(
    delta: Delta,
    *,
    density: Number = 0.5,
    epsilon: Number = 0.15,
    rescale: Flag = True,
    seed: Integer = 0,
    random: Random,
) -> Delta:
    """Elements of a delta kept at random, the larger ones in a row more likely, and enlarged in return: DELLA.

    Formula: delta / p where u < p, else 0, with u uniform in [0, 1) and p = density - e + 2 e (rank - 1) / (n - 1), the
    rank by magnitude in a row of n elements, from 1 for the smallest; without ``rescale`` delta where u < p, else 0.
    e is ``epsilon``, or as much of it as ``density`` leaves room for: min(epsilon, density, 1 - density).

    Spaces: a delta gives a delta. As `dare`, with large changes better kept. A row is the first dimension's; a tensor
    of one dimension is one row, and in a row of one element p is ``density``. u differs from call to call in a recipe.
    It costs a sort of every row.

    Source: MagPrune of DELLA-Merging (Deep et al. 2024, arXiv 2406.11617), whose epsilon is the whole way from the
    least to the greatest p: twice this one, which is mergekit's. mergekit ranks along dimension 1, and rescales by sums
    of magnitudes. The ``della_eps`` of sd-mecha is the paper's; its ranks are those of the whole tensor, and it
    rescales by 1 / density.

    >>> from remelt.core.random import Random
    >>> from torch import tensor
    >>> drawn = Random(seed=0, method="della", key="w", offset=0, size=4)
    >>> della.on(tensor([[1.0, -2.0, 3.0, -4.0]]), density=0.6, epsilon=0.4, random=drawn)
    tensor([[ 0.0000,  0.0000,  4.0909, -4.0000]])
    """
    if density >= 1.0 or not delta.numel():
        return delta.clone()
    if density <= 0.0:
        return torch.zeros_like(delta)
    way = min(abs(epsilon), density, 1.0 - density) * math.copysign(1.0, epsilon)
    width = delta.shape[1]
    order = delta.abs().argsort(dim=1, stable=True)
    along = torch.linspace(density - way, density + way, width, dtype=torch.float64, device=delta.device)
    if width == 1:
        along.fill_(density)
    probability = torch.empty(delta.shape, dtype=torch.float64, device=delta.device)
    probability.scatter_(1, order, along.expand(delta.shape))
    kept = torch.from_numpy(random.uniform(0)).reshape(delta.shape).to(delta.device) < probability
    if rescale:
        delta = delta / probability.to(delta.dtype)
    return torch.where(kept, delta, 0.0)


@merge_method(cut="element", workspace=12.0)
def dropout(
    *deltas: Delta,
    probability: Number = 0.9,
    rescale: Number = 1.0,
    overlap: Number = 1.0,
    overlap_emphasis: Number = 0.0,
    seed: Integer = 0,
    random: Random,
) -> Delta:
    """The mean of those deltas, element by element, that are not dropped, with control over how many meet.

    Formula: (sum of the kept) / (how many are kept) / (1 - p)^rescale, and 0 where none is kept, with p =
    ``probability``. At ``overlap`` 1 each delta is dropped by itself with probability p. At any other overlap all are
    dropped with probability p, else the m deltas of some set are kept, the more likely exp(m tan(pi (o - 1/2))): at 0
    each element is of one delta alone, at 1/2 all sets are equally likely, and near 1 all deltas are kept together. o
    is ``overlap``, or its distance to the next even number, so that it goes up and down between 0 and 1.
    ``overlap_emphasis`` moves these probabilities towards those of a binomial distribution, of sets of m out of n with
    the probability p each, by (1 - |2 o - 1|) of itself.

    Spaces: deltas give a delta. To merge many fine-tunes into one another so that each element comes from few of them.
    Probabilities and emphasis outside of 0 to 1 are meant as these; at p = 1 the result is 0. It costs one pass and a
    random number for each element of each delta.

    Source: sd-mecha's dropout, "n-supermario", after DARE (Yu et al. 2023, arXiv 2311.03099).

    >>> from remelt.core.random import Random
    >>> from torch import ones
    >>> drawn = Random(seed=2, method="dropout", key="w", offset=0, size=4)
    >>> dropout.on(ones(4), 3 * ones(4), probability=0.0, overlap=0.0, random=drawn)
    tensor([1., 3., 3., 1.])
    """
    p = min(max(probability, 0.0), 1.0)
    if p == 1.0:
        return torch.zeros_like(deltas[0])
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    left = _how_many(len(deltas), p, overlap, overlap_emphasis, random.uniform(len(deltas)))
    for place, delta in enumerate(deltas):
        chosen = random.uniform(place) * (len(deltas) - place) < left  # the rest of the set is one of the rest of all
        left -= chosen
        kept = torch.from_numpy(chosen).reshape(delta.shape).to(delta.device)
        total += torch.where(kept, delta, 0.0)
        count += kept
    try:
        enlarged = (1.0 - p) ** rescale
    except OverflowError:
        enlarged = math.inf
    return torch.where(count == 0.0, 0.0, total / count / (enlarged or 1.0))


def _how_many(
    count: int, p: float, overlap: float, emphasis: float, drawn: npt.NDArray[np.float64]
) -> npt.NDArray[np.int16]:
    """How many deltas are kept at each element."""
    chances = np.cumsum(kept_counts(count, p, overlap, emphasis))
    return np.searchsorted(chances[:-1], drawn, side="right").astype(np.int16)


@functools.lru_cache(maxsize=64)
def kept_counts(count: int, p: float, overlap: float, emphasis: float) -> Sequence[float]:
    """The probability that none of so many deltas is kept, one, two, ..., or all.

    >>> kept_counts(2, 0.5, 0.0, 0.0)
    [0.5, 0.5, 0.0]
    """
    ways = [math.lgamma(count + 1) - math.lgamma(m + 1) - math.lgamma(count - m + 1) for m in range(count + 1)]
    if overlap % 2.0 == 1.0:
        return [math.exp(ways[m]) * (1.0 - p) ** m * p ** (count - m) for m in range(count + 1)]
    near = abs((overlap + 1.0) % 2.0 - 1.0)
    slope = math.tan(math.pi * (near - 0.5))
    found = _normalised([ways[m] + slope * m for m in range(1, count + 1)])
    most = (1.0 - abs(2.0 * near - 1.0)) * min(max(emphasis, 0.0), 1.0)
    if most:
        binomial = [ways[m] + (m - 1) * _log(p) + (count - m) * _log(1.0 - p) for m in range(1, count + 1)]
        found = [a + most * (b - a) for a, b in zip(found, _normalised(binomial), strict=True)]
    return [p, *((1.0 - p) * one for one in found)]


def _log(number: float) -> float:
    return math.log(number) if number > 0.0 else -1e300  # not infinite: it is multiplied by 0, too


def _normalised(logarithms: Sequence[float]) -> list[float]:
    """Probabilities in the ratios whose logarithms are given."""
    found = [math.exp(one - max(logarithms)) for one in logarithms]
    return [one / sum(found) for one in found]
