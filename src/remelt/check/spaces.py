"""Spaces: what each step's tensors mean, by affine arithmetic, and where that makes no sense.

A weight has mass 1, a delta mass 0; a number scales mass and sums add it; a param has none.
"""

from __future__ import annotations

from collections.abc import Sequence

from remelt.check.bound import BoundGraph, Step
from remelt.errors import Problem, RecipeError
from remelt.recipe.method import TENSOR_KINDS, Mass

SPACE_MASS: dict[str, Mass] = {"weight": 1.0, "delta": 0.0, "param": None}
_TOLERANCE = 1e-6


def infer_masses(graph: BoundGraph) -> tuple[list[Mass], list[Problem]]:
    """The mass of every step's result, and a problem for every step whose operands cannot be meant.

    A step behind a problem is taken to be what its method promises, so that one mistake is told once.
    """
    masses: list[Mass] = []
    problems: list[Problem] = []
    unsure: set[int] = set()
    for step in graph.steps:
        try:
            masses.append(_snapped(_mass(step, [masses[operand] for _, operand in step.operands])))
        except RecipeError as error:
            hint = None if error.hint is None else f"hint: {error.hint}"
            problems.append(Problem("", error.message, hint, error.span or step.span))
            masses.append(_promised(step, [masses[operand] for _, operand in step.operands]))
            unsure.add(len(masses) - 1)
        else:
            if step.method is not None and step.method.returns == "any" and unsure.intersection(below(step)):
                unsure.add(len(masses) - 1)
    for root in graph.roots:
        if root >= 0 and root not in unsure and name_of(masses[root]) not in ("weight", "delta"):
            problems.append(
                Problem(
                    "",
                    f"a result is a weight (mass 1) or a delta (mass 0), but this one is {_describe(masses[root])}",
                    "hint: a param scales a delta, as in a + mask * (b - a)"
                    if masses[root] is None
                    else "hint: the numbers that scale the models must add up to 1, or to 0 for a difference",
                    graph.steps[root].span,
                )
            )
    return masses, problems


def below(step: Step) -> list[int]:
    """The steps that a step is computed from."""
    return [operand for _, operand in step.operands]


def name_of(mass: Mass) -> str | None:
    """``weight``, ``delta``, ``param``, or None for a mass that is neither.

    >>> name_of(1.0), name_of(0.0), name_of(None), name_of(0.5)
    ('weight', 'delta', 'param', None)
    """
    if mass is None:
        return "param"
    return "weight" if abs(mass - 1.0) <= _TOLERANCE else "delta" if abs(mass) <= _TOLERANCE else None


def _snapped(mass: Mass) -> Mass:
    """A mass that is 1 or 0 but for round-off, as 0.7 + 0.2 + 0.1 is, is that."""
    return {"weight": 1.0, "delta": 0.0}.get(name_of(mass) or "", mass)


def _mass(step: Step, masses: Sequence[Mass]) -> Mass:
    if step.method is None:
        return SPACE_MASS[step.node.space]  # type: ignore[union-attr]
    method = step.method
    kinds = {parameter.name: parameter.kind for parameter in method.parameters}
    shared: Mass = None
    seen_same = False
    for (name, _), mass in zip(step.operands, masses, strict=True):
        kind, space = kinds[name], name_of(mass)
        if kind == "any":
            continue
        if kind == "mask":
            if space != "param":
                raise RecipeError(
                    f"{method.name} needs a mask (space param) for {name!r}, but got {_describe(mass)}",
                    hint='a mask from a file is model("mask", space="param"); a number or block weights do as well',
                )
        elif kind != "same":
            if mass is None or space is None or TENSOR_KINDS[kind] != round(mass):
                raise RecipeError(_wrong(method.name, name, kind, mass), hint=_remedy(kind, space))
        elif space not in ("weight", "delta"):
            raise RecipeError(f"{method.name} needs a weight or a delta for {name!r}, but got {_describe(mass)}")
        elif seen_same and space != name_of(shared):
            raise RecipeError(
                f"{method.name} needs one space, but got {_describe(shared)} and {_describe(mass)} for {name!r}",
                hint="subtracting two weights gives a delta; add_difference adds a delta to a weight",
            )
        else:
            shared, seen_same = mass, True
    if method.declaration.mass is not None:
        return method.declaration.mass(masses, dict(step.values))
    return shared if method.returns == "same" else TENSOR_KINDS[method.returns]


def _promised(step: Step, masses: Sequence[Mass]) -> Mass:
    assert step.method is not None
    if step.method.returns == "same":
        return next((mass for mass in masses if name_of(mass) in ("weight", "delta")), 1.0)
    return TENSOR_KINDS[step.method.returns] if step.method.returns != "any" else 1.0


def _describe(mass: Mass) -> str:
    name = name_of(mass)
    if name is not None:
        return f"a {name}"
    return f"{mass:g} of a weight"


def _wrong(method: str, name: str, kind: str, mass: Mass) -> str:
    return f"{method} needs a {kind} for {name!r}, but got {_describe(mass)}"


def _remedy(kind: str, space: str | None) -> str | None:
    if kind == "delta" and space == "weight":
        return "a delta is a difference of two weights: write b - c, or subtract(b, c)"
    if kind == "weight" and space == "delta":
        return "add the delta to a weight first: add_difference(a, delta)"
    return None
