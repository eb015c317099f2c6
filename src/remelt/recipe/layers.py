"""Stacks of layers put together from parts of others: ``stack_layers(layers(a, 0, 16), layers(b, 8, 24))``.

They are no methods: nothing is computed. Before a recipe is bound, each model below `layers` becomes a view of itself,
in which those layers bear the numbers that they have in the result, and a stack the first of its parts that has a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from remelt.errors import RecipeError
from remelt.recipe.node import Call, LayerRange, Model, Node, Operand, Value, as_node
from remelt.recipe.walk import rewrite, topological

LAYERS, STACK = "layers", "stack_layers"


def layers(model: Operand, start: int, stop: int, *, stack: str | None = None) -> Call:
    """The layers of a model, or of a recipe, from ``start`` up to ``stop``, for `stack_layers`.

    ``stack`` names the container whose numbered children are meant, where the longest is not.
    """
    for name, number in (("start", start), ("stop", stop)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise RecipeError(f"layers needs a whole number for {name!r}, but got {number!r}")
    kwargs = () if stack is None else (("stack", Value(stack)),)
    return Call(LAYERS, (as_node(model), Value(start), Value(stop)), kwargs)


def stack_layers(*parts: Operand) -> Call:
    """A model of the layers of several, one after the other, numbered anew.

    What comes before the layers, such as embeddings, is that of the first part, what comes after that of the last.

    >>> stack_layers(layers("a", 0, 16), layers("b", 8, 24)).method
    'stack_layers'
    """
    if not parts:
        raise RecipeError("stack_layers needs at least one part", hint='stack_layers(layers("a", 0, 16), ...)')
    return Call(STACK, tuple(map(as_node, parts)))


@dataclass(frozen=True)
class _Range:
    """What a call of `layers` says."""

    start: int
    stop: int
    stack: str | None


def expand_layers(recipe: Node) -> Node:
    """The recipe with every stack as models of which a part of the layers is read.

    Raises `RecipeError` for ranges that are none, for parts that differ in length inside, and for models outside.
    """
    order = topological(recipe)
    if not any(isinstance(node, Call) and node.method in (LAYERS, STACK) for node in order):
        return recipe

    def expand(node: Node) -> Node:
        return _stacked(node) if isinstance(node, Call) and node.method == STACK else node

    found = rewrite(recipe, expand)
    left = next((node for node in topological(found) if isinstance(node, Call) and node.method == LAYERS), None)
    if left is not None:  # by itself: a model of that many layers
        found = rewrite(found, lambda node: _stacked(Call(STACK, (node,))) if _is_layers(node) else node)
    return found


def _is_layers(node: Node) -> bool:
    return isinstance(node, Call) and node.method == LAYERS


def _stacked(call: Call) -> Node:
    if call.kwargs or not call.args:
        raise RecipeError(
            "stack_layers takes parts, one after the other",
            hint='stack_layers(layers("a", 0, 16), ...)',
            span=call.span,
        )
    offset = 0
    parts: list[Node] = []
    for place, part in enumerate(call.args):
        found = [node for node in topological(part) if isinstance(node, Call) and node.method == LAYERS]
        if not found:
            raise RecipeError(
                f"part {place + 1} of stack_layers says no layers", hint="layers(model, 0, 16)", span=call.span
            )
        ranges = {id(node): _range(node) for node in found}
        inside = {id(below) for node in found for child in node.children for below in topological(child)}
        nested = next((node for node in found if id(node) in inside), None)
        if nested is not None:
            raise RecipeError("layers of layers are not taken: give the model's own numbers", span=nested.span)
        lengths = {one.stop - one.start for one in ranges.values()}
        if len(lengths) > 1:
            raise RecipeError(
                f"part {place + 1} of stack_layers merges {' and '.join(map(str, sorted(lengths)))} layers: "
                "what is merged has as many on each side",
                span=found[-1].span,
            )
        ends = place == 0, place == len(call.args) - 1
        parts.append(_viewed(part, found, ranges, offset, ends))
        offset += lengths.pop()
    result = parts[0]
    for part in parts[1:]:
        result = Call("fallback", (result, part), span=call.span)
    return result


def _viewed(part: Node, calls: Sequence[Call], ranges: dict[int, _Range], offset: int, ends: tuple[bool, bool]) -> Node:
    """A part with every model as a view of its layers."""
    views: dict[int, Node] = {}
    for call in calls:
        one = ranges[id(call)]
        view = LayerRange(one.start, one.stop, offset, one.stack, *ends)

        def look(node: Node, view: LayerRange = view) -> Node:
            return replace(node, layers=view) if isinstance(node, Model) else node

        views[id(call)] = rewrite(call.args[0], look)
    found = _replaced(part, views)
    outside = next((node for node in topological(found) if isinstance(node, Model) and node.layers is None), None)
    if outside is not None:
        raise RecipeError(
            f"{outside!r} stands beside layers, and has no layers said",
            hint=f"layers({outside!r}, START, STOP)",
            span=outside.span,
        )
    return found


def _replaced(part: Node, views: dict[int, Node]) -> Node:
    """The part with calls of `layers` replaced, from the top down: what is below them stays as it was."""
    if id(part) in views:
        return views[id(part)]
    made: dict[int, Node] = dict(views)
    for node in topological(part):
        if id(node) not in made:
            made[id(node)] = node.with_children(made[id(child)] for child in node.children) if node.children else node
    return made[id(part)]


def _range(call: Call) -> _Range:
    given = dict(zip(("model", "start", "stop", "stack"), call.args, strict=False))
    for name, node in call.kwargs:
        if name in given or name not in ("start", "stop", "stack"):
            hint = 'layers(model, 0, 16, stack="layers")'
            raise RecipeError(f"layers has no {name!r} to be given by name here", hint=hint, span=call.span)
        given[name] = node
    if len(call.args) > 4 or not {"model", "start", "stop"} <= set(given):
        raise RecipeError("layers needs a model and two numbers", hint="layers(model, 0, 16)", span=call.span)
    values = {name: node.value if isinstance(node, Value) else node for name, node in given.items() if name != "model"}
    start, stop, stack = values["start"], values["stop"], values.get("stack")
    for number in (start, stop):
        if isinstance(number, bool) or not isinstance(number, int):
            raise RecipeError(f"layers counts in whole numbers, but got {number!r}", span=call.span)
    if isinstance(given["model"], Value) or not (stack is None or isinstance(stack, str)):
        raise RecipeError("layers needs a model, two numbers, and a text for 'stack'", span=call.span)
    assert isinstance(start, int)
    assert isinstance(stop, int)
    if not 0 <= start < stop:
        raise RecipeError(f"layers begin before they end, from 0 on, but got {start} to {stop}", span=call.span)
    return _Range(start, stop, stack)
