"""Projections: what one tensor has beside the direction of another."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from remelt.recipe.method import Same, Sums, merge_method


def projection_products(a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    """Partial sums of a tile: ``a . a`` and ``a . b``, in float64."""
    x = a.double().flatten()
    return {"aa": (x * x).sum(), "ab": (x * b.double().flatten()).sum()}


def rejection(sums: Mapping[str, float]) -> Mapping[str, float]:
    """How much of ``a`` is taken from ``b``, and of ``b`` is kept: nothing where ``a`` has no direction."""
    share = sums["ab"] / sums["aa"] if sums["aa"] else math.inf
    return {"taken": share, "kept": 1.0} if math.isfinite(share) else {"taken": 0.0, "kept": 0.0}


@merge_method(cut="element", reductions=(projection_products,), conclusion=rejection)
def perpendicular_component(a: Same, b: Same, *, sums: Sums) -> Same:
    """What ``b`` has beside the direction of ``a``.

    Formula: b - a (a . b) / (a . a), over the whole tensor; zero where ``a`` is zero.

    Spaces: most useful between deltas: what one fine-tune learned that another did not. Of two weights it is little
    more than their difference, and no model. Both are read twice.

    Source: sd-mecha, perpendicular_component; the vector rejection of b from a.

    >>> from torch import tensor
    >>> perpendicular_component.on(tensor([1.0, 0.0]), tensor([3.0, 4.0]))
    tensor([0., 4.])
    """
    rest: Tensor = b * sums["kept"] - a * sums["taken"]
    return rest
