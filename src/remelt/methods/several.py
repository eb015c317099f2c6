"""Methods of several models: what is in their middle, and how far deltas that agree may be trusted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from remelt.methods.gram import (
    Floats,
    are_several,
    distances,
    dots,
    fractions,
    matrix,
    mixed,
    mixture,
    norms_and_cosines,
)
from remelt.recipe.method import Delta, Flag, Integer, Number, Numbers, Same, Sums, merge_method

_FAR = 4.0
"""How many times farther than usual an operand is that nothing should be told as a way from."""
_LEAST = 1e-12
"""A share of the largest distance that others count at least: where a step ends on an operand by chance."""
_TIE = 1e-9
"""By how much an operand must hold more than others pull: two that are alike have their middle for median."""
_SINGULAR = 1e-6
"""A denominator of model stock's ratio that counts as zero."""


def nearest_to_all(
    sums: Mapping[str, float],
    *,
    weights: Sequence[float],
    iterations: int,
    tolerance: float,
    smoothing: float = _LEAST,
) -> Mapping[str, float]:
    """Shares of the operands in the point whose distances from them have the least sum.

    A distance counts as at least ``smoothing`` of the largest.
    """
    squares = matrix(sums, "apart", len(weights))
    pulls = fractions(np.maximum(np.array(weights, dtype=np.float64), 0.0))
    if not np.isfinite(squares).all():
        return mixture(pulls, pulls, near=True)
    with np.errstate(all="ignore"):
        for place in range(len(pulls)):
            if _is_nearest_to_all(place, pulls, squares):  # steps would hardly come nearer to it in the end
                return mixture(np.eye(len(pulls))[place], pulls, near=False)
        shares, apart = pulls, _apart(pulls, squares)
        for _ in range(iterations):
            before, shares = shares, pulls / np.maximum(apart, smoothing * apart.max())
            shares = shares / shares.sum()
            apart = _apart(shares, squares)
            if not np.abs(shares - before).max() > tolerance:
                break
        return mixture(shares, pulls, near=bool(apart[0] <= _FAR * np.median(apart)))


def _is_nearest_to_all(place: int, pulls: Floats, squares: Floats) -> bool:
    """Whether the other operands pull away from one less than it, and what is equal to it, holds."""
    away = squares[place] > 0.0
    apart = np.sqrt(squares[place][away])
    between = apart[:, None] ** 2 + apart**2 - squares[np.ix_(away, away)]
    shares = pulls[away] / apart
    strength = math.sqrt(max(0.5 * float(shares @ between @ shares), 0.0))
    return bool(strength < (1.0 - _TIE) * pulls[~away].sum())


def _apart(shares: Floats, squares: Floats) -> Floats:
    """The distance of each operand from a mean of them, by the squares of their distances from each other."""
    pulled = squares @ shares
    found: Floats = np.sqrt(np.maximum(pulled - 0.5 * (shares @ pulled), 0.0))
    return found


@merge_method(
    cut="element",
    reductions=(distances,),
    reduces=are_several,
    conclusion=nearest_to_all,
    limits={"iterations": (0.0, math.inf), "tolerance": (0.0, math.inf)},
    spreads=True,
)
def geometric_median(
    *models: Same,
    weights: Numbers = 1.0,
    iterations: Integer = 100,
    tolerance: Number = 1e-14,
    sums: Sums,
) -> Same:
    """The point whose distances from all models have the least sum.

    Formula: the x with the least w1 |x - m1| + ... + wn |x - mn|, over whole tensors: a model that holds as much as the
    others pull, or what is found from the weighted mean by steps x = (w1 m1 / |x - m1| + ... + wn mn / |x - mn|) /
    (w1 / |x - m1| + ... + wn / |x - mn|), until no model's share changes by more than ``tolerance``, or after
    ``iterations``.

    Spaces: weights give a weight, deltas a delta. ``weights`` are one number for all, or a list of one for each; one
    below 0 counts as 0.

    Models that are unlike the others pull no harder than the rest: use it where some of many may have gone astray. All
    tensors are read twice, however many steps it takes: those are taken on one number for each model.

    Source: Weiszfeld 1937; Vardi and Zhang 2000, for where a model is the median. As in sd-mecha, whose ``maxiter`` is
    ``iterations``; its ``ftol`` looks at the sum of the distances, which stops to change long before x does, and its
    ``eps``, the least distance, is not needed.

    >>> from torch import tensor
    >>> geometric_median.on(tensor([0.0, 0.0]), tensor([1.0, 1.0]), tensor([1.0, 1.0]), tensor([9.0, 9.0]))
    tensor([1., 1.])
    """
    return mixed(models, sums)


@merge_method(cut="element", workspace=8.0)
def median(*models: Same) -> Same:
    """The median of the models, element by element.

    Formula: the middle of m1, ..., mn in order of size; of an even number of them, the mean of the middle two

    Spaces: weights give a weight, deltas a delta.

    An element that one model has far away from the others changes nothing, whatever it is; but for NaN, which gives
    NaN. Tensors are read once; the comparisons grow with the square of their number.

    Source: the median; for the order of comparisons, forgetful selection (Paeth 1990, "Median finding on a 3x3 grid").

    >>> from torch import tensor
    >>> median.on(tensor([1.0, 1.0]), tensor([2.0, 3.0]), tensor([50.0, -7.0]))
    tensor([2., 1.])
    """
    pool, rest = list(models[: len(models) // 2 + 2]), list(models[len(models) // 2 + 2 :])
    while len(pool) > 2:  # the least and the greatest of the pool have too many beyond them to be in the middle
        pool = _without_extremes(pool)
        if rest:
            pool.append(rest.pop())
    if len(pool) == 2:
        return (pool[0] + pool[1]) * 0.5
    return pool[0].clone() if len(models) == 1 else pool[0]


def _without_extremes(pool: Sequence[Tensor]) -> list[Tensor]:
    """Tensors with the same elements in each place, but for the least and the greatest there."""
    pairs = list(zip(pool[::2], pool[1::2], strict=False))
    lows, least = _all_but_one([torch.minimum(*pair) for pair in pairs], torch.minimum, torch.maximum)
    highs, greatest = _all_but_one([torch.maximum(*pair) for pair in pairs], torch.maximum, torch.minimum)
    if len(pool) % 2:
        highs.append(torch.minimum(torch.maximum(least, pool[-1]), greatest))
    return lows + highs


_Choice = Callable[[Tensor, Tensor], Tensor]


def _all_but_one(pool: Sequence[Tensor], chosen: _Choice, other: _Choice) -> tuple[list[Tensor], Tensor]:
    """The pool without the one that is chosen of all in each place, and that one."""
    others, found = [], pool[0]
    for one in pool[1:]:
        others.append(other(found, one))
        found = chosen(found, one)
    return others, found


def trust(sums: Mapping[str, float]) -> Mapping[str, float]:
    """Model stock's ratio, from the cosines of all pairs of deltas; 1 for one delta, and where sums are not finite."""
    count = sum(name.startswith("dot") for name in sums)
    count = int(math.sqrt(2 * count))  # of n (n + 1) / 2
    products = matrix(sums, "dot", count)
    if count == 1 or not np.isfinite(products).all():
        return {"ratio": 1.0}
    cosines = norms_and_cosines(products)[1]
    cosine = float(cosines[np.triu_indices(count, 1)].mean())
    denominator = 1.0 + (count - 1) * cosine
    return {"ratio": count * cosine / denominator if abs(denominator) >= _SINGULAR else 0.0}


@merge_method(cut="element", reductions=(dots,), conclusion=trust, spreads=True)
def model_stock(*deltas: Delta, sums: Sums) -> Delta:
    """The mean of the deltas, as much of it as their angles allow to trust.

    Formula: t (d1 + ... + dn) / n, with t = n c / (1 + (n - 1) c) and c the mean cosine of all pairs of deltas, as
    whole tensors. The cosine with a zero delta is 0; of one delta alone t is 1; where 1 + (n - 1) c is 0, t is 0.

    Spaces: deltas give a delta: ``base + model_stock(a - base, b - base)`` is mergekit's model_stock.

    What fine-tunes of one recipe have in common is kept, what they learned by chance shrinks: deltas that are alike
    give their mean, perpendicular ones nothing, and such as oppose each other a negative multiple. All deltas are read
    twice.

    Source: Model Stock (Jang, Yun and Han 2024, arXiv 2403.19522); as in mergekit.

    >>> from torch import tensor
    >>> model_stock.on(tensor([3.0, 4.0]), tensor([4.0, 3.0]))
    tensor([3.4286, 3.4286])
    """
    mean: Tensor = functools.reduce(torch.add, deltas) / len(deltas)
    return mean.mul_(sums["ratio"])


@merge_method(cut="row", workspace=8.0)
def model_stock_rows(*deltas: Delta, consecutive: Flag = False) -> Delta:
    """The mean of the deltas, of each row as much as its angles allow to trust.

    Formula: that of `model_stock` for each row: the elements of one index of the first dimension. A tensor of one
    dimension is one row. With ``consecutive``, c is the mean cosine of each delta with the next one alone.

    Spaces: deltas give a delta, to be added to the model that they are deltas of.

    Outputs of a layer on which the fine-tunes agree are kept beside others on which they do not. Tensors are read once,
    a tile of rows at a time. For matrices this is mergekit's ``filter_wise: true``, and with ``consecutive`` the
    model_stock of sd-mecha, which depends on the order of three deltas or more; both take each line of a convolution's
    kernel by itself.

    Source: Model Stock (Jang, Yun and Han 2024, arXiv 2403.19522); as in mergekit, and in sd-mecha.

    >>> from torch import tensor
    >>> model_stock_rows.on(tensor([[3.0, 4.0], [1.0, 0.0]]), tensor([[4.0, 3.0], [0.0, 1.0]]))
    tensor([[3.4286, 3.4286],
            [0.0000, 0.0000]])
    """
    count = len(deltas)
    mean: Tensor = functools.reduce(torch.add, deltas) / count
    if count == 1:
        return mean
    pairs = [(i, j) for i in range(count) for j in range(i + 1, i + 2 if consecutive else count) if j < count]
    norms = [_products(delta, delta).sqrt_() for delta in deltas]
    cosine = torch.zeros_like(norms[0])
    for i, j in pairs:
        both = norms[i] * norms[j]
        cosine += torch.where(both > 0.0, _products(deltas[i], deltas[j]) / both, both).clamp_(-1.0, 1.0)
    cosine /= len(pairs)
    denominator = 1.0 + (count - 1) * cosine
    ratio = torch.where(denominator.abs() < _SINGULAR, 0.0, count * cosine / denominator)
    return mean.mul_(torch.where(ratio.isfinite(), ratio, 1.0).to(mean.dtype))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """The product of each two rows, in float64."""
    return (a.double() * b).sum(1, keepdim=True)
