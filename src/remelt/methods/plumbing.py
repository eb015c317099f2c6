"""Plumbing: which keys a result has, from whom, and in which element type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remelt.archs.facts import KeyFacts
from remelt.errors import RecipeError
from remelt.recipe.method import AnySpace, Bindings, Same, Sums, Text, merge_method


def _same_mass(masses: object, values: Bindings) -> float | None:
    assert isinstance(masses, (list, tuple))
    if any(mass != masses[0] for mass in masses):
        raise RecipeError(
            "fallback needs operands of one space: a delta cannot stand in for a weight",
            hint="add the delta to a weight first: a + (b - c) | d",
        )
    first: float | None = masses[0]
    return first


@merge_method(cut="element", first_present=True, mass=_same_mass)
def fallback(a: AnySpace, b: AnySpace) -> AnySpace:
    """The first operand that has the key: the operator ``|``.

    Formula: a where it has the key, else b

    Spaces: both operands in one. For a model that lacks some keys, such as one without a VAE. It costs a copy.

    Source: sd-mecha, fallback.

    >>> from torch import tensor
    >>> fallback.on(tensor([1.0]), tensor([2.0]))
    tensor([1.])
    """
    return a


def not_finite(a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    """How many elements of a tile of ``a`` are NaN or infinite."""
    return {"lost": (a - a != 0.0).sum()}


@merge_method(cut="element", reductions=(not_finite,), mends=True, mass=_same_mass)
def omit_non_finite(a: AnySpace, b: AnySpace, *, sums: Sums) -> AnySpace:
    """A tensor where all of it is finite, else that of another model.

    Formula: a where no element of the tensor is NaN or infinite, else b

    Spaces: both operands in one. Mends a model that was spoiled in training or by an overflow, from one that was not;
    ``--nonfinite missing`` does the same for a whole merge. ``a`` is looked at first: where it is large it is read
    twice.

    Source: sd-mecha, omit_non_finite, in a fallback.

    >>> from torch import tensor
    >>> omit_non_finite.on(tensor([1.0, float("nan")]), tensor([3.0, 4.0]))
    tensor([3., 4.])
    """
    return torch.where(torch.full_like(a, sums["lost"]) > 0.0, b, a)


@merge_method(cut="element", casts="dtype", mass=_same_mass)
def cast(a: AnySpace, dtype: Text) -> AnySpace:
    """The same numbers rounded to an element type, which the result then has.

    Formula: a, rounded to ``dtype`` (``fp16``, ``bf16``, ``fp32``, ``fp8_e4m3`` ...)

    Spaces: any. For tensors that are to have a type of their own; ``--dtype`` sets that of a whole result. It costs
    nothing that writing would not.

    Source: sd-mecha, cast.

    >>> from torch import tensor
    >>> cast.on(tensor([1.0]), "fp16")
    tensor([1.])
    """
    return a


def _is_component(facts: KeyFacts, values: Bindings) -> bool:
    return values["component"] in facts.component_names


def _is_other_component(facts: KeyFacts, values: Bindings) -> bool:
    return not _is_component(facts, values)


@merge_method(cut="element", selects=_is_component)
def pick_component(a: Same, component: Text) -> Same:
    """Only the keys of one component, such as ``vae``.

    Formula: a where the key belongs to ``component``, absent elsewhere

    Spaces: any; ``pick_component(a, "vae") | b`` is b with the VAE of a. Other keys are not read.

    Source: sd-mecha, pick_component.

    >>> from torch import tensor
    >>> pick_component.on(tensor([1.0]), "vae")
    tensor([1.])
    """
    return a


@merge_method(cut="element", selects=_is_other_component)
def omit_component(a: Same, component: Text) -> Same:
    """All keys but those of one component, such as ``ema``.

    Formula: a where the key does not belong to ``component``, absent elsewhere

    Spaces: any. For files without what nobody needs any more. The omitted keys are not read.

    Source: sd-mecha, omit_component.

    >>> from torch import tensor
    >>> omit_component.on(tensor([1.0]), "ema")
    tensor([1.])
    """
    return a


def _stacked(shapes: Sequence[tuple[int, ...]], values: Bindings) -> tuple[int, ...]:
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise RecipeError(
                f"stack needs tensors of one shape, but operand 1 is {list(shapes[0])} "
                f"and operand {number + 1} is {list(shape)}",
                hint="stack models of one architecture",
            )
    return (len(shapes), *shapes[0])


@merge_method(cut="tensor", shape=_stacked, workspace=0.0)
def stack(*models: Same) -> Same:
    """All models' tensors in one, along a new first dimension.

    Formula: s[i] = m_i

    Spaces: all operands in one. For tools that look at several models at once; it costs a copy.

    Source: sd-mecha, stack.

    >>> from torch import tensor
    >>> stack.on(tensor([1.0, 2.0]), tensor([3.0, 4.0]))
    tensor([[1., 2.],
            [3., 4.]])
    """
    return torch.stack(models)
