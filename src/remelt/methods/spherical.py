"""Spherical methods: interpolation along the arc between two directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from remelt.recipe.method import Number, Same, Shortcut, Sums, merge_method

_NO_ARC = 1e-6
"""Sine of an angle below which round-off alone would choose the arc."""


def dot_products(a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    """Partial sums of a tile: ``a . a``, ``b . b`` and ``a . b``, in float64."""
    x, y = a.double().flatten(), b.double().flatten()
    return {"aa": (x * x).sum(), "bb": (y * y).sum(), "ab": (x * y).sum()}


@merge_method(
    cut="element", reductions=(dot_products,), shortcuts=(Shortcut("alpha", 0.0, "a"), Shortcut("alpha", 1.0, "b"))
)
def slerp(a: Same, b: Same, *, alpha: Number = 0.5, sums: Sums) -> Same:
    """Interpolate on the sphere: directions along the arc, norms linearly.

    Formula: (sin((1 - alpha) w) a / |a| + sin(alpha w) b / |b|) / sin(w) * ((1 - alpha) |a| + alpha |b|), with w the
    angle between the whole tensors ``a`` and ``b``. Where there is no one arc (parallel, opposite or zero tensors),
    their linear interpolation.

    Spaces: two weights or two deltas give the same.

    Source: Shoemake 1985, "Animating rotation with quaternion curves"; as in sd-mecha.

    >>> from torch import tensor
    >>> slerp.on(tensor([1.0, 0.0]), tensor([0.0, 1.0]), alpha=0.5)
    tensor([0.7071, 0.7071])
    """
    norm_a, norm_b = sums["aa"].sqrt(), sums["bb"].sqrt()
    omega = torch.arccos((sums["ab"] / (norm_a * norm_b)).clamp(-1.0, 1.0))
    sine = torch.sin(omega)
    norm = torch.lerp(norm_a, norm_b, alpha) / sine
    share_a = norm * torch.sin((1.0 - alpha) * omega) / norm_a
    share_b = norm * torch.sin(alpha * omega) / norm_b
    if not bool(torch.isfinite(share_a) & torch.isfinite(share_b) & (sine > _NO_ARC)):
        return torch.lerp(a, b, alpha)
    return a * float(share_a) + b * float(share_b)
