"""The operators of recipes as methods: affine arithmetic, in which a weight has mass 1 and a delta mass 0."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from remelt.errors import RecipeError
from remelt.recipe.method import AnySpace, Bindings, Mask, Mass, Shortcut, merge_method


def _sum_of_masses(masses: Sequence[Mass], values: Bindings) -> Mass:
    a, b = _both(masses)
    if a is None or b is None:
        return None
    if abs(a - 1) < 1e-9 and abs(b - 1) < 1e-9:
        raise RecipeError(
            "a weight cannot be added to a weight: a delta is due",
            hint="a + (b - c) adds a difference; weighted_sum(a, b) and 0.5 * a + 0.5 * b mix two weights",
        )
    return a + b


def _difference_of_masses(masses: Sequence[Mass], values: Bindings) -> Mass:
    a, b = _both(masses)
    return None if a is None or b is None else a - b


def _both(masses: Sequence[Mass]) -> tuple[Mass, Mass]:
    a, b = masses
    if (a is None) != (b is None):
        raise RecipeError(
            "a param cannot be added to a weight or a delta, nor taken from one",
            hint="a param scales a delta: mask * (b - a)",
        )
    return a, b


def _scaled_mass(masses: Sequence[Mass], values: Bindings) -> Mass:
    (mass, *_), alpha = masses, values.get("alpha")
    if mass is None or mass == 0.0:
        return mass
    if isinstance(alpha, float):
        return mass * alpha
    raise RecipeError(
        "only a delta can be scaled by block or by a mask: a weight so scaled is neither weight nor delta",
        hint="weighted_sum(a, b, alpha=blocks(...)) mixes two weights by block",
    )


def _product_of_masses(masses: Sequence[Mass], values: Bindings) -> Mass:
    a, b = masses
    if a is None and b is None:
        return None
    if a is not None and b is not None:
        raise RecipeError(
            "two models cannot be multiplied: one side must be a number or a param",
            hint='a mask from a file is model("mask", space="param")',
        )
    mass = a if b is None else b
    if mass != 0.0:
        raise RecipeError(
            "only a delta can be multiplied by a param: a weight so scaled is neither weight nor delta",
            hint="a + mask * (b - a), or weighted_sum(a, b, alpha=mask)",
        )
    return mass


@merge_method(cut="element", spreads=True, mass=_sum_of_masses, identities=("a", "b"))
def add(a: AnySpace, b: AnySpace) -> AnySpace:
    """The sum: the operator ``+``.

    Formula: a + b

    Spaces: masses add up. A weight and a delta give a weight; two weights are refused; ``0.5 * a + 0.5 * b`` is one.
    It costs one pass, as all operators do, which a recipe of many shares among them.

    Source: affine arithmetic.

    >>> from torch import tensor
    >>> add.on(tensor([1.0, 2.0]), tensor([0.5, -0.5]))
    tensor([1.5000, 1.5000])
    """
    return a + b


@merge_method(cut="element", spreads=True, mass=_difference_of_masses, identities=("a",))
def subtract(a: AnySpace, b: AnySpace) -> AnySpace:
    """The difference: the operator ``-``.

    Formula: a - b

    Spaces: two weights give a delta; a weight less a delta is a weight. It costs one pass.

    Source: task vectors (Ilharco et al. 2022, arXiv 2212.04089).

    >>> from torch import tensor
    >>> subtract.on(tensor([1.0, 2.0]), tensor([0.5, 3.0]))
    tensor([ 0.5000, -1.0000])
    """
    return a - b


@merge_method(cut="element", spreads=True, mass=_scaled_mass, shortcuts=(Shortcut("alpha", 1.0, "a"),))
def scale(a: AnySpace, alpha: Mask = 1.0) -> AnySpace:
    """A multiple: the operator ``*`` with a number.

    Formula: alpha * a

    Spaces: a delta stays one, and may be scaled by block. A number scales a weight's mass. It costs one pass.

    Source: task arithmetic (Ilharco et al. 2022, arXiv 2212.04089).

    >>> from torch import tensor
    >>> scale.on(tensor([1.0, 2.0]), 0.5)
    tensor([0.5000, 1.0000])
    """
    scaled: Tensor = a * alpha
    return scaled


@merge_method(cut="element", spreads=True, mass=_product_of_masses)
def multiply(a: AnySpace, b: AnySpace) -> AnySpace:
    """The product of a delta and a param, or of two params: the operator ``*`` between tensors.

    Formula: a * b

    Spaces: a delta times a param is a delta; two params give a param. For masks that are computed, or come from a file.
    It costs one pass.

    Source: masks of the Stable Diffusion merging tools.

    >>> from torch import tensor
    >>> multiply.on(tensor([1.0, 2.0]), tensor([0.0, 1.0]))
    tensor([0., 2.])
    """
    return a * b
