"""What plain arguments may be, where a method's declaration gives them a meaning, and what they decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remelt.check.bound import Step
from remelt.check.kinds import Shape
from remelt.check.program import Apply, Listed, Slot
from remelt.core.dtype import DType
from remelt.errors import RecipeError
from remelt.recipe.blocks import BlockWeights
from remelt.recipe.method import Method
from remelt.recipe.signature import names_asked


def floating_type(name: str, step: Step) -> DType:
    """The type of a cast: weights are rounded to floating-point numbers, never cut off to integers."""
    dtype = DType.parse(name)
    if not dtype.is_float:
        raise RecipeError(f"weights are floating-point numbers, but are cast to {name!r}", span=step.span)
    return dtype


def refuse_by_key(step: Step, applied: Apply) -> None:
    """Refuse numbers by key that sums across all tensors are asked for."""
    conclusion = applied.method.declaration.conclusion
    if conclusion is None or not any(one.across for one in applied.reductions):
        return
    for name, argument in applied.kwargs:
        if isinstance(argument, (Slot, Listed)) and name in names_asked(conclusion):
            raise RecipeError(
                f"{applied.method.name} looks at all tensors together, so {name!r} is the same for all of them",
                hint="a plain number, without block weights",
                span=step.span,
            )


def finest(step: Step, shapes: Sequence[Shape]) -> Method[..., Any]:
    """The method of a step, or the one that makes its call in finer cuts where operands are of these shapes."""
    assert step.method is not None
    finer = step.method.declaration.finer
    if finer is None or len(shapes) < len(step.operands):
        return step.method
    return finer(shapes, {name: one for name, one in step.values if not isinstance(one, BlockWeights)}) or step.method
