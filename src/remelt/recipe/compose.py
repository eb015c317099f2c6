"""Composition: filling a recipe's parameters with models or other recipes, without capture of their names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe.blocks import BlockWeights, Search
from remelt.recipe.node import Call, Model, Node, Operand, Parameter, Value, as_node, model
from remelt.recipe.walk import fold, rewrite, topological


def parameters_of(recipe: Node) -> dict[str, Parameter]:
    """The recipe's parameters by name; `RecipeError` where one name is declared in two ways."""
    found: dict[str, Parameter] = {}
    for node in topological(recipe):
        if not isinstance(node, Parameter):
            continue
        first = found.setdefault(node.name, node)
        if (first.space, first.arch) != (node.space, node.arch):
            raise RecipeError(
                f"parameter {node.name!r} is declared as {first.space} of {first.arch or 'any arch'} "
                f"and as {node.space} of {node.arch or 'any arch'}",
                hint="declare it once, and use the name",
                span=node.span,
            )
    return found


def searches_of(recipe: Node) -> list[Search]:
    """The open numbers of a recipe, in the order of its steps."""
    found: list[Search] = []
    for node in topological(recipe):
        if isinstance(node, Value):
            for value in node.value if isinstance(node.value, tuple) else (node.value,):
                if isinstance(value, Search):
                    found.append(value)
                elif isinstance(value, BlockWeights):
                    found.extend(value.searches())
    return found


def compose(recipe: Node, arguments: Mapping[str, Operand] | None = None, /, **named: Operand) -> Node:
    """The recipe with parameters filled by models or recipes; parameters that are not named stay open.

    The parameters of an argument are renamed into its scope: composing a recipe that has its own ``b`` into ``a``
    gives ``a.b``. A text or path becomes a model of the parameter's space and arch. Raises `RecipeError` for a name
    that the recipe does not have, and for a model of another space or arch.

    >>> from remelt.recipe.node import parameter
    >>> inner = 0.5 * parameter("a") + 0.5 * parameter("b")
    >>> sorted(parameters_of(compose(parameter("a") - parameter("b"), a=inner)))
    ['a.a', 'a.b', 'b']
    """
    known = parameters_of(recipe)
    filled: dict[str, Node] = {}
    for name, operand in {**(arguments or {}), **named}.items():
        if name not in known:
            have = ", ".join(sorted(known)) or "none"
            hint = nearest_hint(name, known) or f"its parameters: {have}"
            raise RecipeError(f"the recipe has no parameter {name!r}", hint=hint)
        filled[name] = _scoped(name, _fitting(known[name], operand))

    def fill(node: Node) -> Node:
        return filled.get(node.name, node) if isinstance(node, Parameter) else node

    return rewrite(recipe, fill)


def _fitting(hole: Parameter, operand: Operand) -> Node:
    """What fills a parameter: it has its space and arch, as far as the recipe tells; the rest is checked with files."""
    if isinstance(operand, (str, os.PathLike)):
        return model(operand, space=hole.space, arch=hole.arch)
    node = as_node(operand)
    if not isinstance(node, (Model, Parameter)):
        _refuse_unfitting(hole, node)
        return node
    kind = type(node).__name__.lower()
    for said, wanted, got in (("space", hole.space, node.space), ("arch", hole.arch, node.arch)):
        if wanted is not None and got is not None and wanted != got:
            raise RecipeError(
                f"parameter {hole.name!r} has the {said} {wanted}, but {kind} {node.name!r} that fills it has {got}",
                hint=f'say what it is: {kind}({json.dumps(node.name)}, {said}="{wanted}")',
                span=hole.span,
            )
    return node if hole.arch is None or node.arch is not None else replace(node, arch=hole.arch)


def _refuse_unfitting(hole: Parameter, recipe: Node) -> None:
    """Refuse a computed argument whose space or arch is another one, where the recipe alone tells."""
    space = _space_of(recipe)
    if space is not None and space != hole.space:
        raise RecipeError(
            f"parameter {hole.name!r} has the space {hole.space}, but the recipe that fills it gives a {space}",
            hint="a - b is a delta; base + (a - b) is a weight",
            span=hole.span,
        )
    for node in topological(recipe) if hole.arch is not None else ():
        if isinstance(node, (Model, Parameter)) and node.arch is not None and node.arch != hole.arch:
            raise RecipeError(
                f"parameter {hole.name!r} has the arch {hole.arch}, but {node!r} in the recipe that fills it "
                f"has {node.arch}",
                span=hole.span,
            )


def _space_of(recipe: Node) -> str | None:
    """What a recipe gives by affine arithmetic; None where a method decides, as methods are not looked up here."""

    def mass(node: Node, below: Sequence[float | None]) -> float | None:
        if isinstance(node, (Model, Parameter)):
            return {"weight": 1.0, "delta": 0.0}.get(node.space)
        if not isinstance(node, Call) or None in below[: len(node.args)]:
            return None
        known = [value for value in below[: len(node.args)] if value is not None]
        if node.method in ("add", "subtract") and len(known) == 2:
            return known[0] + known[1] if node.method == "add" else known[0] - known[1]
        alpha = dict(node.kwargs).get("alpha")
        if node.method == "scale" and len(known) == 1 and isinstance(alpha, Value) and isinstance(alpha.value, float):
            return known[0] * alpha.value
        return None

    found = fold(recipe, mass)
    return None if found is None else "weight" if abs(found - 1.0) < 1e-6 else "delta" if abs(found) < 1e-6 else None


def _scoped(scope: str, argument: Node) -> Node:
    def rename(node: Node) -> Node:
        return replace(node, name=f"{scope}.{node.name}") if isinstance(node, Parameter) else node

    return rewrite(argument, rename)
