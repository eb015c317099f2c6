"""Methods that multiply: geometric means, quotients in proportion, and mixes chosen by how alike elements are.

Powers are exponentials of logarithms in float64: torch's own differ in the last place by where in memory an element
stands, and in float32 the logarithm of a quotient near 1 has few digits left.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from remelt.recipe.method import Mask, Same, Shortcut, merge_method

_LEAST = -1e300
"""Stands for the logarithm of 0."""


@merge_method(cut="element", shortcuts=(Shortcut("alpha", 0.0, "a"), Shortcut("alpha", 1.0, "b")), workspace=12.0)
def geometric_sum(a: Same, b: Same, *, alpha: Mask = 0.5) -> Same:
    """The weighted geometric mean, element by element.

    Formula: |a|^(1 - alpha) |b|^alpha cos(pi ((1 - alpha) [a < 0] + alpha [b < 0])), the real part of the complex
    product a^(1 - alpha) b^alpha, with [x] 1 where x holds, else 0

    Spaces: two weights or two deltas give the same; meant for deltas, and for ``alpha`` between 0 and 1. Keeps what
    both have: an element that either lacks is 0, and at ``alpha`` 0.5 so is one on whose sign they differ. It
    costs one pass with two powers an element.

    Source: sd-mecha, geometric_sum.

    >>> from torch import tensor
    >>> geometric_sum.on(tensor([1.0, -1.0, 0.0]), tensor([4.0, -4.0, 4.0]))
    tensor([ 2., -2.,  0.])
    """
    x, y = a.double(), b.double()
    turn = (1.0 - alpha) * (x < 0.0).double() + alpha * (y < 0.0).double()
    mean: Tensor = _geometric_mean(x, y, alpha) * (math.pi * turn).cos()
    return mean.to(a.dtype)


@merge_method(cut="element", shortcuts=(Shortcut("alpha", 0.0, "a"),), workspace=14.0)
def multiply_quotient(a: Same, b: Same, c: Same, *, alpha: Mask = 1.0) -> Same:
    """Multiply ``a`` by what ``b`` is in proportion to ``c``, where ``a`` went from ``c`` the other way.

    Formula: the real part of a (b / c)^p, which is a |b / c|^p cos(pi p [b / c < 0]), with
    p = alpha max(0, -x y / max(|x|, |y|)^2), x = ln|a / c| and y = ln|b / c|; a where x or y is not finite

    Spaces: three weights or three deltas give the same. `add_strict_opposite` for magnitudes that grow or shrink by
    factors. It costs one pass with two logarithms and a power an element; at ``alpha`` 0 only ``a`` is read.

    Source: sd-mecha, multiply_quotient.

    >>> from torch import tensor
    >>> multiply_quotient.on(tensor([2.0, 2.0, 0.0]), tensor([0.5, 4.0, 1.0]), tensor([1.0, 1.0, 2.0]))
    tensor([1., 2., 0.])
    """
    quotient = b.double() / c.double()
    y = quotient.abs().log()
    power = alpha * _opposition((a.double() / c.double()).abs().log(), y)
    turn = torch.where(quotient < 0.0, math.pi * power, 0.0)
    factor = torch.where(power == 0.0, 0.0, power * y).exp() * turn.cos()
    return (a.double() * factor).to(a.dtype)


def _opposition(x: Tensor, y: Tensor) -> Tensor:
    """The lesser of two numbers by the greater, where their signs differ; 0 elsewhere, and beside infinity."""
    greater = torch.maximum(x.abs(), y.abs())
    opposed = -(x / greater) * (y / greater)
    return torch.where(opposed > 0.0, opposed, 0.0)


@merge_method(cut="element", workspace=14.0)
def multiply_difference(a: Same, b: Same, c: Same, *, alpha: Mask, beta: Mask) -> Same:
    """The weighted geometric mean of two differences from ``c``, added to it.

    Formula: c + s |a - c|^(1 - alpha) |b - c|^alpha, with s -1 where (1 - beta) (a - c) + beta (b - c) < 0, else 1

    Spaces: three weights or three deltas give the same; ``alpha`` is meant to be between 0 and 1. Keeps what two
    fine-tunes of ``c`` both changed; ``beta`` says whose direction counts where they differ. It costs one pass with
    two powers an element.

    Source: meh, multiply_difference.

    >>> from torch import tensor
    >>> multiply_difference.on(tensor([5.0, -3.0]), tensor([2.0, 5.0]), tensor([1.0, 1.0]), alpha=0.5, beta=0.25)
    tensor([ 3., -3.])
    """
    x, y = a.double() - c.double(), b.double() - c.double()
    mean = _geometric_mean(x, y, alpha)
    return (c.double() + torch.where((1.0 - beta) * x + beta * y < 0.0, -mean, mean)).to(c.dtype)


def _geometric_mean(a: Tensor, b: Tensor, alpha: Any) -> Tensor:
    """``|a|^(1 - alpha) |b|^alpha``, with 0^0 = 1."""
    exponent: Tensor = _logarithm(a) * (1.0 - alpha) + _logarithm(b) * alpha
    return exponent.exp()


def _logarithm(a: Tensor) -> Tensor:
    """The logarithm of the magnitude, such that 0 times that of 0 is 0."""
    return a.abs().log().clamp(min=_LEAST)


@merge_method(cut="element", spreads=True, shortcuts=(Shortcut("alpha", 0.0, "a"),), workspace=6.0)
def similarity_add_difference(a: Same, b: Same, c: Same, *, alpha: Mask, beta: Mask) -> Same:
    """Between an added difference, where ``a`` and ``b`` differ, and a weighted sum, where they are alike.

    Formula: (1 - s) (a + alpha (b - c)) + s ((1 - alpha / 2) a + alpha / 2 b), with
    s = beta / 2 (1 + a b / max(|a|, |b|)^2), and s = beta where both are 0

    Spaces: three weights or three deltas give the same. ``beta`` is how far to go: at 0 the difference alone is
    added; at 1 equal elements are not moved, opposite ones in full. It costs one pass; at ``alpha`` 0 only ``a`` is
    read.

    Source: meh, similarity_add_difference; sd-webui-bayesian-merger.

    >>> from torch import tensor
    >>> similarity_add_difference.on(tensor([1.0, 1.0]), tensor([1.0, -1.0]), tensor([0.0, 0.0]), alpha=1.0, beta=1.0)
    tensor([1., 0.])
    """
    greater = torch.maximum(a.abs(), b.abs())
    likeness = torch.where(greater == 0.0, 1.0, (a / greater) * (b / greater))
    added = a + alpha * (b - c)
    mixed = torch.lerp(a, b, alpha / 2.0)
    return torch.lerp(added, mixed, beta * (0.5 + 0.5 * likeness))
