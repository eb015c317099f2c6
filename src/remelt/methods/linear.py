"""Linear methods: sums and means of weights, and differences added to them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from remelt.errors import RecipeError
from remelt.recipe.method import Bindings, Delta, Mask, Mass, Numbers, Same, Shortcut, merge_method

_NO_WEIGHT = 1e-8
"""Sum of weights below which there is nothing to divide by, but for round-off."""


def _mass_of_mean(masses: Sequence[Mass], values: Bindings) -> Mass:
    weights = values.get("weights")
    _require_weight(weights if isinstance(weights, tuple) else ())
    if any(mass != masses[0] for mass in masses):
        raise RecipeError("n_average needs models of one space", hint="subtracting two weights gives a delta")
    return masses[0]


def _require_weight(weights: Sequence[object]) -> None:
    """Refuse plain weights that add up to 0; some that are not known yet are taken as they are."""
    known = [weight for weight in weights if isinstance(weight, float)]
    if weights and len(known) == len(weights) and abs(sum(known)) < _NO_WEIGHT:
        raise RecipeError(
            f"n_average divides by the sum of the weights, but {', '.join(f'{weight:g}' for weight in known)} "
            "add up to 0",
            hint="0.5 * (a - b) is a difference in proportion",
        )


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


@merge_method(cut="element", spreads=True, mass=_mass_of_mean)
def n_average(*models: Same, weights: Numbers = 1.0) -> Same:
    """The mean of any number of models, weighted or not.

    Formula: (w1 m1 + w2 m2 + ... + wn mn) / (w1 + w2 + ... + wn)

    Spaces: weights give a weight, deltas a delta. ``weights`` is one number for all, or a list of one for each; they
    need not add up to 1, but not to 0 either. Good for fine-tunes of one recipe; each model is read once.

    Source: model soups (Wortsman et al. 2022, arXiv 2203.05482); weights as in mergekit's ``linear``.

    >>> from torch import tensor
    >>> n_average.on(tensor([1.0, 2.0]), tensor([3.0, 2.0]), tensor([5.0, 5.0]))
    tensor([3., 3.])
    >>> n_average.on(tensor([1.0, 2.0]), tensor([3.0, 2.0]), weights=[3.0, 1.0])
    tensor([1.5000, 2.0000])
    """
    if all(type(weight) is float and weight == 1.0 for weight in weights):
        total = models[0].clone()
        for model in models[1:]:
            total += model
        return total.div_(len(models))
    if all(type(weight) is float for weight in weights):
        _require_weight(weights)
    weighted = models[0] * weights[0]
    for model, weight in zip(models[1:], weights[1:], strict=True):
        weighted = weighted + model * weight
    mean: Tensor = weighted / functools.reduce(operator.add, weights)
    return mean


@merge_method(cut="element", spreads=True, shortcuts=(Shortcut("alpha", 0.0, "a"),), identities=("a",))
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
