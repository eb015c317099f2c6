"""The recipe with every call bound to its method: a flat table of steps, shared work found once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from remelt.core.nearest import nearest_hint
from remelt.errors import Problem, RecipeError, Span
from remelt.recipe.blocks import BlockWeights, Search, render_weight
from remelt.recipe.method import Method
from remelt.recipe.node import Call, Model, Node, Parameter, Value
from remelt.recipe.signature import bind
from remelt.recipe.walk import topological


@dataclass(frozen=True, slots=True)
class Step:
    """One node with what it needs: operands are indices of earlier steps, values everything that is no tensor.

    ``input`` is the model's index among the graph's models, or None for a call. ``operands`` pairs a parameter's name
    with a step, in the order of the function's arguments.
    """

    node: Model | Call
    input: int | None
    method: Method[..., Any] | None = None
    operands: tuple[tuple[str, int], ...] = ()
    values: tuple[tuple[str, Any], ...] = ()
    occurrence: int = 0
    """Of a method that draws: how many other calls of it with the same seed the recipe has before this one."""

    @property
    def span(self) -> Span | None:
        """Where the step stands in the recipe's text."""
        return self.node.span


@dataclass
class BoundGraph:
    """All steps after those that they need; the models among them; one result a recipe."""

    steps: list[Step] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    scopes: list[str] = field(default_factory=list)
    """For each model, the folder of the recipe that names it."""
    roots: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    _reachable: dict[int, list[int]] = field(default_factory=dict)

    def reachable(self, root: int) -> list[int]:
        """The steps that one result needs, in order."""
        if root not in self._reachable:
            needed = [False] * (root + 1)
            needed[root] = True
            for index in range(root, -1, -1):
                if needed[index]:
                    for _, operand in self.steps[index].operands:
                        needed[operand] = True
            self._reachable[root] = [index for index, keep in enumerate(needed) if keep]
        return self._reachable[root]

    def models_of(self, root: int) -> list[int]:
        """The models that one result needs, in the order in which the recipe names them, from left to right."""
        found: dict[int, None] = {}
        seen: set[int] = set()
        pending = [root]
        while pending:
            index = pending.pop()
            if index in seen:
                continue
            seen.add(index)
            step = self.steps[index]
            if step.input is not None:
                found.setdefault(step.input)
            pending += [operand for _, operand in reversed(step.operands) if operand not in seen]
        return list(found)


def bind_recipes(
    recipes: Sequence[Node], methods: Mapping[str, Method[..., Any]], scopes: Sequence[str] = ()
) -> BoundGraph:
    """Bind every call of the recipes; what cannot be bound is a problem of the graph, all of them at once.

    Models of the same name, lock, space and arch are one step, and so are equal calls of equal operands. ``scopes``
    gives the folder of each recipe, where its models' names are looked up first.
    """
    graph = BoundGraph()
    binder = _Binder(graph, methods)
    for position, recipe in enumerate(recipes):
        binder.begin(scopes[position] if scopes else "")
        for node in topological(recipe):
            binder.add(node)
        graph.roots.append(binder.root(recipe))
    return graph


def numbers_of(values: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every value with its argument's name, those of lists one by one."""
    for name, value in values:
        for item in value if isinstance(value, tuple) else (value,):
            yield name, item


class _Binder:
    def __init__(self, graph: BoundGraph, methods: Mapping[str, Method[..., Any]]) -> None:
        self.graph = graph
        self.methods = methods
        self.scope = ""
        self.index_of: dict[int, int | None] = {}
        self.known: dict[tuple[object, ...], int] = {}
        self.drawing: dict[tuple[object, ...], dict[tuple[object, ...], int]] = {}
        """For each method that draws and each seed, its calls in the recipe, numbered."""

    def begin(self, scope: str) -> None:
        """Go on with another recipe: what it draws does not depend on those that are merged with it."""
        self.scope = scope
        self.index_of = {}
        self.drawing = {}

    def add(self, node: Node) -> None:
        if isinstance(node, Model):
            self.index_of[id(node)] = self.model(node)
        elif isinstance(node, Parameter):
            self.problem(
                f"parameter {node.name!r} is still open",
                f"fill it: compose(recipe, {node.name}=...) or remelt compose ... -p {node.name} PATH",
                node.span,
            )
            self.index_of[id(node)] = None
        elif isinstance(node, Call):
            try:
                self.index_of[id(node)] = self.call(node)
            except RecipeError as error:
                self.problem(error.message, error.hint, error.span or node.span)
                self.index_of[id(node)] = None

    def model(self, node: Model) -> int:
        held = None if node.tensors is None else id(node.tensors)
        identity = (
            *(self.scope, node.name, node.sha256, node.space, node.arch, held),
            *(node.layers, node.vocabulary, node.adapter, node.part, node.permuted),
        )
        found = self.known.get(identity)
        if found is None:
            self.graph.models.append(node)
            self.graph.scopes.append(self.scope)
            found = self.append(identity, Step(node, len(self.graph.models) - 1))
        return found

    def call(self, node: Call) -> int | None:
        method = self.methods.get(node.method)
        if method is None:
            raise RecipeError(
                f"no merge method is named {node.method!r}",
                hint=nearest_hint(node.method, self.methods) or "remelt info lists them",
                span=node.span,
            )
        bound = bind(method, node)
        operands: list[tuple[str, int]] = []
        for parameter, operand in bound.operands:
            index = self.model(operand) if isinstance(operand, Model) else self.index_of.get(id(operand))
            if index is None:
                return None
            operands.append((parameter.name, index))
        for name, value in numbers_of(bound.values):
            if isinstance(value, Search) or (isinstance(value, BlockWeights) and next(value.searches(), None)):
                shown = render_weight(value) if isinstance(value, Search) else repr(value)
                raise RecipeError(
                    f"{method.name}: {name} is still open: {shown}",
                    hint="a study fills it; to merge now, write a number",
                    span=dict(node.spans).get(name, node.span),
                )
        identity: tuple[object, ...] = (node.method, tuple(operands), bound.values)
        occurrence = 0
        if "random" in method.given:
            alike = self.drawing.setdefault((node.method, dict(bound.values).get("seed")), {})
            occurrence = alike.setdefault(identity, len(alike))
            identity = (*identity, occurrence)
        found = self.known.get(identity)
        if found is not None:
            return found
        return self.append(identity, Step(node, None, method, tuple(operands), bound.values, occurrence))

    def append(self, identity: tuple[object, ...], step: Step) -> int:
        self.graph.steps.append(step)
        self.known[identity] = len(self.graph.steps) - 1
        return len(self.graph.steps) - 1

    def root(self, recipe: Node) -> int:
        if isinstance(recipe, Value):
            if isinstance(recipe.value, str):
                return self.model(Model(recipe.value, span=recipe.span))
            hint = "the last line names a step, a model or a call of a method"
            self.problem(f"a recipe's result is a model, but got {recipe!r}", hint, recipe.span)
        index = self.index_of.get(id(recipe))
        return -1 if index is None else index

    def problem(self, message: str, hint: str | None, span: Span | None) -> None:
        problem = Problem("", message, None if hint is None else f"hint: {hint}", span)
        if problem not in self.graph.problems:
            self.graph.problems.append(problem)
