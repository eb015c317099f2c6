"""Linear methods: sums and means of weights, and differences added to them."""

from __future__ import annotations

import torch
from torch import Tensor

from remelt.recipe.method import Delta, Mask, Same, Shortcut, merge_method


@merge_method(cut="element", spreads=True, shortcuts=(Shortcut("alpha", 0.0, "a"), Shortcut("alpha", 1.0, "b")))
def weighted_sum(a: Same, b: Same, *, alpha: Mask = 0.5) -> Same:
    """Move ``a`` towards ``b``.

    Formula: (1 - alpha) * a + alpha * b

    Spaces: two weights or two deltas give the same. ``alpha`` may be a number, one number per block, or a mask. At 0
    only ``a`` is read, at 1 only ``b``.

    Source: the weighted sum of the Stable Diffusion web interfaces; linear interpolation (Wortsman et al. 2022).

    >>> from torch import tensor
    >>> weighted_sum.on(tensor([0.0, 4.0]), tensor([2.0, 0.0]), alpha=0.25)
    tensor([0.5000, 3.0000])
    """
    return torch.lerp(a, b, alpha)  # alpha is a float or a tensor of the compute type: nothing is rounded


@merge_method(cut="element", spreads=True)
def n_average(*models: Same) -> Same:
    """The mean of any number of models.

    Formula: (m1 + m2 + ... + mn) / n

    Spaces: weights give a weight, deltas a delta.

    Source: model soups (Wortsman et al. 2022, arXiv 2203.05482).

    >>> from torch import tensor
    >>> n_average.on(tensor([1.0, 2.0]), tensor([3.0, 2.0]), tensor([5.0, 5.0]))
    tensor([3., 3.])
    """
    total = models[0].clone()
    for model in models[1:]:
        total += model
    return total.div_(len(models))


@merge_method(cut="element", spreads=True, shortcuts=(Shortcut("alpha", 0.0, "a"),))
def add_difference(a: Same, b: Delta, *, alpha: Mask = 1.0) -> Same:
    """Add a difference of models to a model.

    Formula: a + alpha * b

    Spaces: ``b`` is a delta, written ``b - c``; ``a`` is a weight or a delta. At ``alpha`` 0 only ``a`` is read.

    Source: "add difference" of the Stable Diffusion web interfaces; task arithmetic (Ilharco et al. 2022, arXiv
    2212.04089).

    >>> from torch import tensor
    >>> add_difference.on(tensor([1.0, 1.0]), tensor([2.0, -2.0]), alpha=0.5)
    tensor([2., 0.])
    """
    moved: Tensor = a + alpha * b
    return moved
