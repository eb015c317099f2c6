"""Spherical methods: interpolation along the arc between two directions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from remelt.recipe.method import Number, Same, Shortcut, Sums, merge_method

_NO_ARC = 1e-6
"""Sine of an angle below which round-off alone would choose the arc."""

_NEARLY_PARALLEL = 0.9995
"""Cosine of an angle below which mergekit takes the chord."""


def dot_products(a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    """Partial sums of a tile: ``a . a``, ``b . b`` and ``a . b``, in float64."""
    x, y = a.double().flatten(), b.double().flatten()
    return {"aa": (x * x).sum(), "bb": (y * y).sum(), "ab": (x * y).sum()}


def arc(sums: Mapping[str, float], *, alpha: float) -> Mapping[str, float]:
    """A point on the arc as shares of ``a`` and of the way from ``a`` to ``b``; on the chord where no arc is."""
    norm_a, norm_b = math.sqrt(sums["aa"]), math.sqrt(sums["bb"])
    product = norm_a * norm_b
    if 0.0 < product < math.inf:
        omega = math.acos(min(max(sums["ab"] / product, -1.0), 1.0))
        sine = math.sin(omega)
        if sine > _NO_ARC:
            norm = (norm_a + alpha * (norm_b - norm_a)) / sine
            share_a = norm * math.sin((1.0 - alpha) * omega) / norm_a
            share_b = norm * math.sin(alpha * omega) / norm_b
            if math.isfinite(share_a + share_b):
                return {"start": share_a + share_b, "way": share_b}
    return {"start": 1.0, "way": alpha}


def plain_arc(sums: Mapping[str, float], *, alpha: float) -> Mapping[str, float]:
    """The shares of ``a`` and of the way to ``b`` where norms are left as they are; on the chord near parallel."""
    product = math.sqrt(sums["aa"]) * math.sqrt(sums["bb"])
    cosine = sums["ab"] / product if 0.0 < product < math.inf else 0.0
    if abs(cosine) <= _NEARLY_PARALLEL:
        omega = math.acos(cosine)
        share_a, share_b = (math.sin(share * omega) / math.sin(omega) for share in (1.0 - alpha, alpha))
        return {"start": share_a + share_b, "way": share_b}
    return {"start": 1.0, "way": alpha}


@merge_method(
    cut="element",
    reductions=(dot_products,),
    conclusion=arc,
    shortcuts=(Shortcut("alpha", 0.0, "a"), Shortcut("alpha", 1.0, "b")),
)
def slerp(a: Same, b: Same, *, alpha: Number = 0.5, sums: Sums) -> Same:
    """Interpolate on the sphere: directions along the arc, norms linearly.

    Formula: (sin((1 - alpha) w) a / |a| + sin(alpha w) b / |b|) / sin(w) * ((1 - alpha) |a| + alpha |b|), with w the
    angle between the whole tensors ``a`` and ``b``. Where there is no one arc (parallel, opposite or zero tensors),
    their linear interpolation.

    Spaces: two weights or two deltas give the same. Keeps the size of what it mixes, where a weighted sum of unlike
    tensors shrinks it. Both tensors are read twice, or kept for the second time if they are small.

    Source: Shoemake 1985, "Animating rotation with quaternion curves"; as in sd-mecha.

    >>> from torch import tensor
    >>> slerp.on(tensor([1.0, 0.0]), tensor([0.0, 1.0]), alpha=0.5)
    tensor([0.7071, 0.7071])
    """
    return _point(a, b, sums)


@merge_method(
    cut="element",
    reductions=(dot_products,),
    conclusion=plain_arc,
    shortcuts=(Shortcut("alpha", 0.0, "a"), Shortcut("alpha", 1.0, "b")),
)
def slerp_plain(a: Same, b: Same, *, alpha: Number = 0.5, sums: Sums) -> Same:
    """Interpolate with the shares of an arc, whatever the norms are: the ``slerp`` of mergekit.

    Formula: (sin((1 - alpha) w) a + sin(alpha w) b) / sin(w), with w the angle between the whole tensors ``a`` and
    ``b``; their linear interpolation where the cosine of w is above 0.9995, or below its negative.

    Spaces: two weights or two deltas give the same. For results as mergekit has them. It costs what `slerp` does.

    Source: mergekit. Where the norms are equal it is `slerp`; else the norm of the result is not between theirs.

    >>> from torch import tensor
    >>> slerp_plain.on(tensor([1.0, 0.0]), tensor([0.0, 2.0]), alpha=0.5)
    tensor([0.7071, 1.4142])
    """
    return _point(a, b, sums)


def _point(a: Tensor, b: Tensor, sums: Mapping[str, float]) -> Tensor:
    """The point that a conclusion's shares give."""
    point: Tensor = a * sums["start"] + (b - a) * sums["way"]
    return point
