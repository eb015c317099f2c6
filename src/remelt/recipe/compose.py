"""Composition: filling a recipe's parameters with models or other recipes, without capture of their names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeError
from remelt.recipe.blocks import BlockWeights, Search
from remelt.recipe.node import Model, Node, Operand, Parameter, Value, as_node, model
from remelt.recipe.walk import rewrite, topological


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
    >>> inner = parameter("a") - parameter("b")
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
    """What fills a parameter: models and parameters have its space and arch; what is computed is checked later."""
    if isinstance(operand, (str, os.PathLike)):
        return model(operand, space=hole.space, arch=hole.arch)
    node = as_node(operand)
    if not isinstance(node, (Model, Parameter)):
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


def _scoped(scope: str, argument: Node) -> Node:
    def rename(node: Node) -> Node:
        return replace(node, name=f"{scope}.{node.name}") if isinstance(node, Parameter) else node

    return rewrite(argument, rename)
