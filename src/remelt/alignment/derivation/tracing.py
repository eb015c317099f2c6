"""Derives the axis groups of any module from the graph that torch.export makes of it.

Every axis of every parameter begins as a label of its own. The graph is followed once, operation by operation: rules
tie, divide and cut labels. An operation that no rule knows pins all that it touches, as inputs and outputs do, so what
is left free is safe.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from remelt.alignment.derivation import choices, contractions, layouts, normalisations, pointwise
from remelt.alignment.derivation.calls import Call, Result, Rules, Traced, pin_all, tensors_in
from remelt.alignment.derivation.grouping import grouped
from remelt.alignment.derivation.labels import UNIT, Dimensions, Label, Pinned, pin, touch
from remelt.archs.axis_groups import AxisGroup, faults
from remelt.errors import RefusedError

RULES = Rules()
for _part in (pointwise, layouts, contractions, normalisations, choices):
    RULES.update(_part.RULES)

_MOVES = {*layouts.RULES, *(f"aten::{name}" for name in ("_to_copy", "to", "clone", "contiguous", "alias", "detach"))}
"""Operations that compute nothing: what they leave aside is not touched, and they keep indices what they are."""


def groups_from_module(
    module: torch.nn.Module, example_inputs: Sequence[Any], example_kwargs: Mapping[str, Any] | None = None
) -> tuple[AxisGroup, ...]:
    """The axis groups of a module, fixed ones included, by the names of its ``state_dict()``.

    ``example_inputs`` and ``example_kwargs`` are arguments that it can be called with; their numbers do not matter, and
    their shapes only as far as the module computes differently for others. It is looked at in evaluation mode, through
    ``torch.export``; it may be on the meta device, so that a model of any size takes no memory. Parameters and buffers
    of ``state_dict()`` may be permuted; other constants, inputs, outputs, and what an unknown operation touches are
    fixed.

    Raises `RefusedError` where torch.export cannot trace the module.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(group.name, group.structure) for group in groups_from_module(net, (torch.zeros(1, 4),))]
    [('0', 'free'), ('fixed.2', 'fixed'), ('fixed.4', 'fixed')]
    """
    program = _exported(module, tuple(example_inputs), dict(example_kwargs or {}))
    names = _names(module)
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    follower = _Follower(program, names, state)
    follower.run()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    axes = {name: follower.axes[key] for name, key in names.items() if key in follower.axes and name in shapes}
    groups = grouped(axes, shapes)
    wrong = list(faults(groups, shapes))
    assert not wrong, wrong
    return groups


def _exported(module: torch.nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> ExportedProgram:
    with _evaluating(module), torch.no_grad():
        try:
            program: ExportedProgram = torch.export.export(module, inputs, keywords, strict=False)
            whole: ExportedProgram = program.run_decompositions({})  # keeps operations, writes to no tensor in place
        except Exception as error:  # torch.export has no class of its own for what it cannot trace
            said = str(error).strip().split("\n\n")[0]
            raise RefusedError(
                f"torch.export cannot trace {type(module).__name__}: {type(error).__name__}: {said}",
                hint="trace a part of it, or one whose path does not depend on numbers"
                ' (of a mixture of transformers: set_experts_implementation("batched_mm"))',
            ) from error
    return whole


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    training = {part for part in module.modules() if part.training}
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _names(module: torch.nn.Module) -> dict[str, str]:
    """The first name of every parameter and buffer, by each of its names."""
    first: dict[int, str] = {}
    found = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found[name] = first.setdefault(id(tensor), name)
    return found


class _Follower:
    """Follows a graph, and keeps what each node's tensors are made of."""

    def __init__(self, program: ExportedProgram, names: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> None:
        self.program = program
        self.names = names
        self.state = state
        self.axes: dict[str, Dimensions] = {}
        self.values: dict[Node, Any] = {}

    def run(self) -> None:
        """Go through the graph once."""
        inputs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        live = _live(self.program.graph.nodes)
        for node in self.program.graph.nodes:
            if node not in live:
                continue
            if node.op == "placeholder":
                self.values[node] = self._input(node, inputs[node.name])
            elif node.op == "get_attr":
                self.values[node] = _pinned(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                pin_all(tensors_in([pytree.tree_leaves(self._resolved(node.args))]))

    def _input(self, node: Node, spec: Any) -> Any:
        stored = spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        if not stored or spec.target not in self.state or not self.state[spec.target].is_floating_point():
            return _pinned(node)
        key = self.names.get(spec.target, spec.target)
        if key not in self.axes:
            self.axes[key] = _labelled(tuple(self.state[spec.target].shape))
        return Traced(self.axes[key], source=node.name)

    def _resolved(self, values: Any) -> Any:
        return pytree.tree_map(lambda one: self.values[one] if isinstance(one, Node) else one, values)

    def _call(self, node: Node) -> Any:
        arguments, keywords = self._resolved(node.args), self._resolved(node.kwargs)
        if node.target is operator.getitem:
            return _named(arguments[0][arguments[1]], node)
        shapes = _shapes(node)
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return self._unknown(shapes, tensors_in(pytree.tree_leaves([arguments, keywords])))
        bound = {one.name: one.default_value for one in schema.arguments if one.has_default_value()}
        bound |= {one.name: value for one, value in zip(schema.arguments, arguments, strict=False)} | keywords
        call = Call(schema.name, bound, shapes, node.name)
        found = self._applied(call, torch.Tag.pointwise in getattr(node.target, "tags", ()))
        return _named(found, node) if not isinstance(node.meta.get("val"), list | tuple) else found

    def _applied(self, call: Call, is_pointwise: bool) -> Result:
        if call.name not in _MOVES:
            for tensor in call.tensors:
                touch(tensor.dimensions)
        rule = RULES.get(call.name, pointwise.by_place if is_pointwise else None)
        if call.shapes and all(0 in shape for shape in call.shapes):
            return call.pinned()  # nothing comes of it
        empty = any(0 in tensor.shape for tensor in call.tensors) and call.name != "aten::cat"
        if rule is None or empty or not call.shapes or 0 in call.shapes[0]:
            return self._unknown(call.shapes, call.tensors)
        try:
            found = rule(call)
            outputs = found if isinstance(found, tuple) else (found,)
            given = tuple(one.shape for one in outputs if one is not None)
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError):
            given = None  # a form of the operation that its rule does not expect; what it has tied is safe
        if given != call.shapes:
            return self._unknown(call.shapes, call.tensors)
        for tensor in call.tensors:
            if tensor.picks is not None and not _follows(call, tensor, outputs):
                pin(tensor.picks)
        return found

    def _unknown(self, shapes: tuple[tuple[int, ...], ...], tensors: Any) -> Result:
        pin_all(tensors)
        return tuple(Traced(tuple(Pinned(size) for size in shape)) for shape in shapes)


def _follows(call: Call, tensor: Traced, outputs: Sequence[Traced | None]) -> bool:
    """Whether a rule knows that the numbers of a tensor are indices."""
    if call.name in choices.RULES:
        indices = call.get("indices") or []
        taken = [call.get("index"), *(indices if isinstance(indices, list | tuple) else [indices])]
        return any(one is tensor for one in taken) or call.name == "aten::one_hot"
    return call.name in _MOVES and all(one is not None and one.picks is tensor.picks for one in outputs)


def _live(nodes: Iterable[Node]) -> set[Node]:
    """The nodes that something comes of in the end."""
    live: set[Node] = set()
    for node in reversed(list(nodes)):
        if node.op == "output" or any(user in live for user in node.users):
            live.add(node)
    return live


def _named(found: Any, node: Node) -> Any:
    if isinstance(found, tuple) and len(found) == 1:
        found = found[0]
    return replace(found, source=node.name) if isinstance(found, Traced) else found


def _shapes(node: Node) -> tuple[tuple[int, ...], ...]:
    values = node.meta.get("val")
    listed = values if isinstance(values, list | tuple) else [values]
    shapes = [tuple(one.shape) for one in listed if isinstance(one, torch.Tensor)]
    if any(not isinstance(size, int) for shape in shapes for size in shape):
        raise RefusedError(
            f"the size of what {node.target} gives depends on numbers: {node.name} is {shapes[0]}",
            hint="trace a part without it: groups are derived for sizes that are known",
        )
    return tuple(shapes)


def _pinned(node: Node) -> Any:
    shapes = _shapes(node)
    return Traced(tuple(Pinned(size) for size in shapes[0]), source=node.name) if shapes else node.meta.get("val")


def _labelled(shape: tuple[int, ...]) -> Dimensions:
    """A label for each axis of a parameter, which may depend on all the others as far as is known."""
    labels = [Label(size) for size in shape]
    for label in labels:
        label.scopes = [frozenset(one for one in labels if one is not label)]
    return tuple(label if label.size != 1 else UNIT for label in labels)
