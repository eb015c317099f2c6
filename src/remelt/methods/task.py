"""Task arithmetic and other sums of models: differences added, limited, or chosen element by element."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remelt.recipe.method import (
    ELEMENTS,
    AnySpace,
    Bindings,
    Delta,
    Flag,
    Mask,
    Mass,
    Numbers,
    Same,
    Shortcut,
    Sums,
    Weight,
    merge_method,
)

_NO_WEIGHT = 1e-8
"""Sum of weights below which nothing is divided, as in mergekit."""

_NO_SPREAD = 1e-12
"""Share of the mean square below which a variance is round-off."""


@merge_method(
    cut="element", spreads=True, shortcuts=(Shortcut("scaling", 0.0, "base"),), identities=("base",), workspace=3.0
)
def task_arithmetic(
    base: Weight, *deltas: Delta, weights: Numbers = 1.0, scaling: Mask = 1.0, normalize: Flag = False
) -> Weight:
    """Add what several fine-tunes learned to the model that they began from.

    Formula: base + scaling (w1 d1 + w2 d2 + ... + wn dn); with ``normalize`` the sum is divided by w1 + ... + wn,
    unless these add up to 0.

    Spaces: a weight and deltas, written ``a - base``, give a weight. ``weights`` is one number for all deltas, or a
    list of one for each; ``scaling`` may differ by block or be a mask. The method to begin with: the only one that
    helps reliably on language models from the wild (arXiv 2511.21437). With several, a ``scaling`` of 0.3 to 0.5
    is usual. Every model is read once.

    Source: task arithmetic (Ilharco et al. 2022, arXiv 2212.04089); weights and ``normalize`` as in mergekit.

    >>> from torch import tensor
    >>> task_arithmetic.on(tensor([1.0, 1.0]), tensor([1.0, 0.0]), tensor([0.0, -2.0]), weights=[1.0, 0.5])
    tensor([2., 0.])
    """
    total = functools.reduce(torch.add, [_weighted(*pair) for pair in zip(deltas, weights, strict=True)])
    if normalize:
        total = _divided(total, functools.reduce(operator.add, weights))
    moved: Tensor = base + (total if type(scaling) is float and scaling == 1.0 else total * scaling)
    return moved


def _weighted(delta: Tensor, weight: float) -> Tensor:
    return delta if type(weight) is float and weight == 1.0 else delta * weight


def _divided(total: Tensor, weight: float) -> Tensor:
    """The sum by its weight; as it is where there is none: a weight by block cannot be compared, the quotient can."""
    quotient = total / weight
    return torch.where(quotient.abs() <= total.abs() / _NO_WEIGHT, quotient, total)


@merge_method(cut="element", shortcuts=(Shortcut("alpha", 0.0, "a"),), workspace=3.0)
def add_difference_clamped(a: Same, b: Same, c: Same, *, alpha: Mask = 1.0) -> Same:
    """Add what ``b`` has over ``c`` to ``a``, but go no further than ``b``.

    Formula: a + alpha (b - c), not below min(a, b) nor above max(a, b), element by element

    Spaces: three weights or three deltas give the same. For differences that would burn when added in full: elements
    where ``a`` is beyond ``b`` already stay. It costs one pass.

    Source: the add_difference of sd-mecha 0 with three models, ``clamp_to_ab`` in sd-mecha 1.

    >>> from torch import tensor
    >>> add_difference_clamped.on(tensor([1.0, 1.0, 1.0]), tensor([2.0, 2.0, 0.0]), tensor([0.0, 1.5, -1.0]))
    tensor([2.0000, 1.5000, 1.0000])
    """
    moved = a + alpha * (b - c)
    return torch.minimum(torch.maximum(moved, torch.minimum(a, b)), torch.maximum(a, b))


@merge_method(cut="element", spreads=True, workspace=3.0)
def triple_sum(a: Same, b: Same, c: Same, *, alpha: Mask, beta: Mask) -> Same:
    """The weighted sum of three models at once.

    Formula: (1 - alpha - beta) a + alpha b + beta c

    Spaces: three weights or three deltas give the same. For three models that stand side by side; where one is mixed
    into the mix of two others, see `sum_twice`. It costs one pass.

    Source: "Triple sum" of supermerger; triple_sum of meh.

    >>> from torch import tensor
    >>> triple_sum.on(tensor([8.0]), tensor([4.0]), tensor([0.0]), alpha=0.25, beta=0.5)
    tensor([3.])
    """
    total: Tensor = torch.lerp(a, b, alpha) + beta * (c - a)
    return total


@merge_method(cut="element", spreads=True, shortcuts=(Shortcut("beta", 1.0, "c"),))
def sum_twice(a: Same, b: Same, c: Same, *, alpha: Mask, beta: Mask) -> Same:
    """The weighted sum of two models, and of the result and a third.

    Formula: (1 - beta) ((1 - alpha) a + alpha b) + beta c

    Spaces: three weights or three deltas give the same. The same as two calls of `weighted_sum`, in one pass; at
    ``beta`` 1 only ``c`` is read.

    Source: "sum Twice" of supermerger; sum_twice of meh.

    >>> from torch import tensor
    >>> sum_twice.on(tensor([8.0]), tensor([4.0]), tensor([0.0]), alpha=0.25, beta=0.5)
    tensor([3.5000])
    """
    return torch.lerp(torch.lerp(a, b, alpha), c, beta)


@merge_method(cut="element", shortcuts=(Shortcut("t", 0.0, "base"),), workspace=5.0)
def nearswap(base: Same, other: Same, *, t: Mask) -> Same:
    """Move every element towards ``other`` by at most ``t``.

    Formula: base + sign(d) min(|d|, t), with d = other - base; ``other`` itself where |d| <= t. The same as
    (1 - w) base + w other with w = min(t / |d|, 1). A ``t`` below 0 counts as 0.

    Spaces: two weights or two deltas give the same. Takes ``other`` over where both are nearly alike, and leaves
    where they differ almost as it was; a ``t`` of 0.0001 is usual. It costs one pass.

    Source: NearSwap (alchemonaut, QuartetAnemoi-70B-t0.0001); mergekit.

    >>> from torch import tensor
    >>> nearswap.on(tensor([0.0, 0.0, 0.0]), tensor([0.125, 2.0, -2.0]), t=0.5)
    tensor([ 0.1250,  0.5000, -0.5000])
    """
    way = other - base
    distance = way.abs()
    step = way.sign() * distance.clamp(max=t).clamp(min=0.0)
    return torch.where(distance <= t, other, base + step)


def moments(a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    """Partial sums of a tile: of each operand and of its squares, in float64."""
    x, y = a.double().flatten(), b.double().flatten()
    return {"a": x.sum(), "b": y.sum(), "aa": (x * x).sum(), "bb": (y * y).sum()}


def shares_of_deviation(sums: Mapping[str, float]) -> Mapping[str, float]:
    """What the magnitudes of ``a`` and ``b`` are multiplied by, to compare them in units of their deviations."""
    of_a, of_b = (_deviation(sums[name], sums[name * 2], int(sums[ELEMENTS])) for name in ("a", "b"))
    if not min(of_a, of_b) > 0.0 or not math.isfinite(of_a + of_b):
        return {"a": float(of_a > 0.0), "b": float(of_b > 0.0)}
    largest = max(of_a, of_b)
    return {"a": of_b / largest, "b": of_a / largest}


def _deviation(total: float, squares: float, count: int) -> float:
    """The standard deviation of a sample; the root mean square of one that has none."""
    variance = (squares - total * total / count) / (count - 1) if count > 1 else 0.0
    if not variance * count > _NO_SPREAD * squares:
        variance = squares / max(count, 1)
    return math.sqrt(variance)


@merge_method(
    cut="element",
    reductions=(moments,),
    conclusion=shares_of_deviation,
    shortcuts=(Shortcut("alpha", 0.0, "a"),),
    workspace=4.0,
)
def select_max_delta(a: Delta, b: Delta, *, alpha: Mask = 0.5, sums: Sums) -> Delta:
    """Of two deltas, element by element, the one that is larger in units of its standard deviation.

    Formula: a where (1 - alpha) |a| / s(a) >= alpha |b| / s(b), else b, with s the standard deviation over the whole
    tensor; the root mean square where that is 0, or there is one element only. A delta of zeros is never larger.

    Spaces: two deltas give a delta. Keeps the strongest change of either fine-tune in full, where a mean would halve
    both. Both are read twice where the tensor is large: sums first.

    Source: sd-mecha 0.0.29, select_max_delta.

    >>> from torch import tensor
    >>> select_max_delta.on(tensor([1.0, -3.0, 0.5]), tensor([20.0, 10.0, -10.0]))
    tensor([ 20.,  -3., -10.])
    """
    ours, theirs = a.abs() * sums["a"], b.abs() * sums["b"]
    return torch.where((1.0 - alpha) * ours >= alpha * theirs, a, b)


def _kept_mass(masses: Sequence[Mass], values: Bindings) -> Mass:
    return masses[0]


@merge_method(cut="element", spreads=True, mass=_kept_mass, shortcuts=(Shortcut("scale", 1.0, "a"),))
def passthrough(a: AnySpace, scale: Mask = 1.0) -> AnySpace:
    """The model times a number, meant to be what it was.

    Formula: scale * a

    Spaces: a weight stays a weight, a delta a delta, a param a param, and ``scale`` may differ by block. For stacks
    of layers, some of which are damped: `scale` and ``0.5 * a`` give half a weight instead, which another half
    completes. It costs one pass; a copy where ``scale`` is 1.

    Source: mergekit, passthrough.

    >>> from torch import tensor
    >>> passthrough.on(tensor([1.0, 2.0]), 0.5)
    tensor([0.5000, 1.0000])
    """
    scaled: Tensor = a * scale
    return scaled
