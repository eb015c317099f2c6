"""Spherical methods by row, and of several operands: arcs, and means of directions.

Means of directions lie in the span of their operands: they are found from the operands' products alone (see `gram`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from remelt.methods.cosine import BY_COLUMN
from remelt.methods.gram import Floats, are_several, dots, fractions, matrix, mixed, mixture, norms_and_cosines
from remelt.methods.spherical import dot_products
from remelt.recipe.method import Integer, Number, Numbers, Same, Shortcut, Sums, merge_method

_NO_ARC = 1e-6
"""Sine of an angle, or length of a mean of directions, below which round-off alone would choose a direction."""

_ENDS = (Shortcut("alpha", 0.0, "a"), Shortcut("alpha", 1.0, "b"))


def free_arc(sums: Mapping[str, float], *, alpha: float) -> Mapping[str, float]:
    """The shares of ``a`` and of the way to ``b`` where norms are left as they are; on the chord where no arc is."""
    product = math.sqrt(sums["aa"]) * math.sqrt(sums["bb"])
    if 0.0 < product < math.inf:
        omega = math.acos(min(max(sums["ab"] / product, -1.0), 1.0))
        sine = math.sin(omega)
        if sine > _NO_ARC:
            share_b = math.sin(alpha * omega) / sine
            start = math.sin((1.0 - alpha) * omega) / sine + share_b
            if math.isfinite(start):
                return {"start": start, "way": share_b}
    return {"start": 1.0, "way": alpha}


@merge_method(cut="element", reductions=(dot_products,), conclusion=free_arc, shortcuts=_ENDS, spreads=True)
def nuslerp(a: Same, b: Same, *, alpha: Number = 0.5, sums: Sums) -> Same:
    """Interpolate with the shares of an arc, however small its angle: mergekit's NuSLERP.

    Formula: (sin((1 - alpha) w) a + sin(alpha w) b) / sin(w), with w the angle between the whole tensors ``a`` and
    ``b``. Where there is no one arc (parallel, opposite or zero tensors), their linear interpolation.

    Spaces: two weights or two deltas give the same. mergekit's weights w1 and w2 are alpha = w2 / (w1 + w2); its
    ``base_model`` is ``base + nuslerp(a - base, b - base)``.

    Between fine-tunes of one base the angle is so small that this is a weighted sum: use it between deltas. It keeps
    their size where a sum of unlike deltas would shrink. Both tensors are read twice. `slerp` also interpolates norms;
    `slerp_plain` differs from this only at angles below two degrees, where it takes the chord.

    Source: mergekit, ``nuslerp`` with ``nuslerp_flatten``.

    >>> from torch import tensor
    >>> nuslerp.on(tensor([1.0, 0.0]), tensor([0.0, 2.0]), alpha=0.5)
    tensor([0.7071, 1.4142])
    """
    point: Tensor = (a * sums["start"]).add_((b - a).mul_(sums["way"]))
    return point


@merge_method(cut="row", shortcuts=_ENDS, workspace=7.0)
def nuslerp_rows(a: Same, b: Same, *, alpha: Number = 0.5) -> Same:
    """Interpolate each row with the shares of an arc of its own, norms as they come.

    Formula: that of `nuslerp` for each row: the elements of one index of the first dimension. A tensor of one
    dimension is one row.

    Spaces: two weights or two deltas give the same.

    Each output of a layer turns by its own angle, so that one which both models changed alike does not follow the
    others. Tensors are read once, a tile of rows at a time. For matrices this is mergekit's ``nuslerp_flatten: false``,
    which for kernels of convolutions takes each line of a kernel by itself; what it calls ``nuslerp_row_wise`` is
    `nuslerp_columns`.

    Source: mergekit, ``nuslerp``.

    >>> from torch import tensor
    >>> nuslerp_rows.on(tensor([[1.0, 0.0], [1.0, 1.0]]), tensor([[0.0, 2.0], [3.0, 3.0]]), alpha=0.5)
    tensor([[0.7071, 1.4142],
            [2.0000, 2.0000]])
    """
    return _along(a, b, alpha)


@merge_method(**BY_COLUMN, shortcuts=_ENDS)
def nuslerp_columns(a: Same, b: Same, *, alpha: Number = 0.5, sums: Sums) -> Same:
    """Interpolate each column with the shares of an arc of its own, norms as they come.

    Formula: that of `nuslerp` for each column: the elements that differ in the index of the first dimension alone. A
    tensor of one dimension is one column.

    Spaces: two weights or two deltas give the same.

    A column is what one input of a layer gives to all its outputs, or one feature of all tokens of an embedding. Both
    tensors are read twice, as columns do not lie together.

    Source: mergekit, ``nuslerp`` with ``nuslerp_row_wise: true`` and ``nuslerp_flatten: false``.

    >>> from torch import tensor
    >>> nuslerp_columns.on(tensor([[1.0, 1.0], [0.0, 2.0]]), tensor([[0.0, 3.0], [2.0, 6.0]]), alpha=0.5)
    tensor([[0.7071, 2.0000],
            [1.4142, 4.0000]])
    """
    return _on_arcs(a, b, alpha, sums["aa"].to(a.device), sums["bb"].to(a.device), sums["ab"].to(a.device))


@merge_method(cut="row", shortcuts=_ENDS, workspace=7.0)
def slerp_rows(a: Same, b: Same, *, alpha: Number = 0.5) -> Same:
    """Interpolate each row on its own sphere: directions along the arc, norms linearly.

    Formula: that of `slerp` for each row: the elements of one index of the first dimension. A tensor of one dimension
    is one row. Where a row has no one arc (parallel, opposite or zero rows), its linear interpolation.

    Spaces: two weights or two deltas give the same.

    Each output of a layer keeps a size between those that it had, where a weighted sum of unlike models shrinks it.
    Tensors are read once, a tile of rows at a time.

    Source: Shoemake 1985, "Animating rotation with quaternion curves"; sd-mecha's slerp, row by row.

    >>> from torch import tensor
    >>> slerp_rows.on(tensor([[1.0, 0.0], [1.0, 1.0]]), tensor([[0.0, 3.0], [3.0, 3.0]]), alpha=0.5)
    tensor([[1.4142, 1.4142],
            [2.0000, 2.0000]])
    """
    return _along(a, b, alpha, norms=True)


def _along(a: Tensor, b: Tensor, alpha: float, *, norms: bool = False) -> Tensor:
    """The points on the arcs between rows."""
    x, y = a.double(), b.double()
    square_a, square_b, product = ((one * other).sum(1, keepdim=True) for one, other in ((x, x), (y, y), (x, y)))
    del x, y
    return _on_arcs(a, b, alpha, square_a, square_b, product, norms=norms)


def _on_arcs(
    a: Tensor, b: Tensor, alpha: float, square_a: Tensor, square_b: Tensor, cosine: Tensor, *, norms: bool = False
) -> Tensor:
    """The points on the arcs between vectors of those products, whose norms are interpolated or left as they come."""
    norm_a, norm_b = square_a.sqrt(), square_b.sqrt()
    product = norm_a * norm_b
    omega = (cosine / product).clamp_(-1.0, 1.0).acos_()
    sine = omega.sin()
    share_a, share_b = ((1.0 - alpha) * omega).sin_() / sine, (alpha * omega).sin_() / sine
    if norms:
        norm = torch.lerp(norm_a, norm_b, alpha)
        share_a, share_b = share_a * (norm / norm_a), share_b * (norm / norm_b)
    curved = (product < math.inf) & (sine > _NO_ARC) & (share_a + share_b).isfinite()
    near = ~curved | (norm_a <= 2.0 * norm_b)  # else the way from a would lose what b is
    start = torch.where(curved, torch.where(near, share_a + share_b, share_a), 1.0).to(a.dtype)
    way = torch.where(curved, share_b, alpha).to(a.dtype)
    return (a * start).add_((b - a * near).mul_(way))


def mean_direction(sums: Mapping[str, float], *, weights: tuple[float, ...]) -> Mapping[str, float]:
    """Shares of the operands in the weighted mean of their directions, at the weighted mean of their norms."""
    fair = fractions(weights)
    norms, cosines = norms_and_cosines(matrix(sums, "dot", len(fair)))
    return _directed(fair, norms, cosines, fair * (norms > 0.0))


@merge_method(cut="element", reductions=(dots,), reduces=are_several, conclusion=mean_direction, spreads=True)
def multislerp(*models: Same, weights: Numbers = 1.0, sums: Sums) -> Same:
    """The weighted mean of directions, with the weighted mean of norms: mergekit's multislerp.

    Formula: (w1 |m1| + ... + wn |mn|) s / |s|, with s = w1 m1 / |m1| + ... + wn mn / |mn|, over whole tensors; the
    weights divided by their sum. Zero tensors have no direction, but count for the norm. Where the directions cancel
    out, the weighted mean of the tensors.

    Spaces: weights give a weight, deltas a delta. ``weights`` are one number for all, or a list of one for each; where
    they cancel out, they are taken for equal. mergekit's ``base_model`` is ``base + multislerp(a - base, b - base)``,
    its ``normalize_weights: false`` a multiple of that difference: the sum of the weights.

    For two equally weighted tensors it is `slerp`, half way. mergekit goes on from s / |s| in the tangent space, but
    its vectors there add up to zero. `karcher_mean` is the mean along arcs. All tensors are read twice.

    Source: mergekit, ``multislerp``.

    >>> from torch import tensor
    >>> multislerp.on(tensor([1.0, 0.0]), tensor([0.0, 3.0]), weights=[1.0, 1.0])
    tensor([1.4142, 1.4142])
    """
    return mixed(models, sums)


def mean_along_arcs(
    sums: Mapping[str, float], *, weights: tuple[float, ...], iterations: int, tolerance: float
) -> Mapping[str, float]:
    """Shares of the operands in the mean of their directions along arcs, at the weighted mean of their norms."""
    fair = fractions(weights)
    norms, cosines = norms_and_cosines(matrix(sums, "dot", len(fair)))
    pulls = fractions(fair * (norms > 0.0)) * (norms > 0.0)
    length = _length(pulls, cosines)
    if not length > _NO_ARC:
        return _directed(fair, norms, cosines, pulls)
    mean = pulls / length
    with np.errstate(all="ignore"):
        for _ in range(iterations):
            nearness = np.clip(cosines @ mean, -1.0, 1.0)
            angles = np.arccos(nearness)
            sines = np.sin(angles)
            factors = pulls * np.where(sines > _NO_ARC, angles / sines, nearness > 0.0)
            tangent = factors - (factors @ nearness) * mean
            length = _length(tangent, cosines)
            mean = np.cos(length) * mean + np.sinc(length / np.pi) * tangent
            mean = mean / _length(mean, cosines)
            if not np.abs(tangent).max() > tolerance:
                break
    return _directed(fair, norms, cosines, mean)


@merge_method(
    cut="element",
    reductions=(dots,),
    reduces=are_several,
    conclusion=mean_along_arcs,
    limits={"iterations": (0.0, math.inf), "tolerance": (0.0, math.inf)},
    spreads=True,
)
def karcher_mean(
    *models: Same, weights: Numbers = 1.0, iterations: Integer = 100, tolerance: Number = 1e-14, sums: Sums
) -> Same:
    """The mean of directions along the arcs of the sphere, with the weighted mean of norms: mergekit's karcher.

    Formula: (w1 |m1| + ... + wn |mn|) x, with x the unit tensor at which w1 log(x, m1) + ... + wn log(x, mn) = 0, where
    log(x, m) points from x along the arc to m / |m| and is as long as that; found by steps along this sum from the mean
    of the directions, until one changes no tensor's share by more than ``tolerance``, or after ``iterations``. Weights
    are divided by their sum. Zero tensors have no direction, but count for the norm; one opposite to x does not pull.
    Where the directions cancel out at the start, the weighted mean of the tensors.

    Spaces: weights give a weight, deltas a delta. ``weights`` are one number for all, or a list of one for each; where
    they cancel out, they are taken for equal.

    Of two tensors it is `slerp`; use it for `slerp` of more. All tensors are read twice, however many steps it takes:
    those are taken on one number for each tensor.

    Source: the Riemannian centre of mass (Karcher 1977); for merging, arXiv 2603.04972 and mergekit.

    >>> from torch import tensor
    >>> karcher_mean.on(tensor([1.0, 0.0]), tensor([0.0, 1.0]), weights=[2.0, 1.0])
    tensor([0.8660, 0.5000])
    """
    return mixed(models, sums)


def _directed(fair: Floats, norms: Floats, cosines: Floats, direction: Floats) -> Mapping[str, float]:
    """A direction, given by shares of the operands' directions, at the mean of their norms; else the operands' mean."""
    near = bool((cosines[0] > 0.5).all() and norms.max() < 2.0 * norms.min())
    length = _length(direction, cosines)
    if not length > _NO_ARC or not np.isfinite(norms).all():
        return mixture(fair, fair, near=near)
    with np.errstate(all="ignore"):
        shares = np.where(norms > 0.0, direction / length * (float(fair @ norms) / norms), 0.0)
    return mixture(shares, fair, near=near)


def _length(shares: Floats, cosines: Floats) -> float:
    """The norm of a sum of multiples of directions."""
    with np.errstate(all="ignore"):
        return math.sqrt(max(float(shares @ cosines @ shares), 0.0))
