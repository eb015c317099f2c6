"""The four kinds of node that a recipe is made of, and the operators between them.

Nodes are immutable and compare by identity. A recipe may be 100,000 calls deep: printing, hashing and pickling never
recurse.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

from remelt.errors import RecipeError, Span
from remelt.recipe.axis_orders import AlignedTo, PermutedBy
from remelt.recipe.blocks import BlockWeights, Search, render_weight
from remelt.recipe.walk import topological

Literal = Union[None, bool, int, float, str, BlockWeights, Search, tuple["Literal", ...]]  # noqa: UP007  (recursive)
Operand = Union["Node", str, "os.PathLike[str]", int, float, BlockWeights, Search]
SPACES = ("weight", "delta", "param")


class Node:
    """A step of a recipe: a model, a value, a parameter, or a call of a merge method."""

    __slots__ = ()
    span: Span | None

    @property
    def children(self) -> tuple[Node, ...]:
        """The nodes that this one is computed from."""
        return ()

    def with_children(self, children: Iterable[Node]) -> Node:
        """The same node computed from others, in the order of `children`."""
        return self

    def __add__(self, other: Operand) -> Call:
        return Call("add", (self, as_node(other)))

    def __radd__(self, other: Operand) -> Call:
        return Call("add", (as_node(other), self))

    def __sub__(self, other: Operand) -> Call:
        return Call("subtract", (self, as_node(other)))

    def __rsub__(self, other: Operand) -> Call:
        return Call("subtract", (as_node(other), self))

    def __mul__(self, other: Operand) -> Call:
        return multiply(self, as_node(other))

    def __rmul__(self, other: Operand) -> Call:
        return multiply(as_node(other), self)

    def __neg__(self) -> Call:
        return multiply(self, Value(-1.0))

    def __or__(self, other: Operand) -> Call:
        return Call("fallback", (self, as_node(other)))

    def __ror__(self, other: Operand) -> Call:
        return Call("fallback", (as_node(other), self))

    def __bool__(self) -> bool:
        raise RecipeError("a recipe has no truth value: it is not computed until it is merged")

    def __reduce__(self) -> tuple[Callable[..., Node], tuple[object, ...]]:
        return _unflatten, (flatten(self),)

    def digest(self) -> str:
        """A hash of what the recipe says, whatever its names of steps and its layout as text.

        >>> (Model("a") - Model("b")).digest() == (Model("a") - Model("b")).digest()
        True
        """
        return digests(topological(self))[id(self)].hex()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


@dataclass(frozen=True)
class LayerRange:
    """Which layers of a model are read, and as which: those from ``start`` up to ``stop`` as ``offset`` and so on.

    ``stack`` names their container, where it is not the longest; ``before`` and ``after`` tell whether what comes
    before the layers and after them is read, too.
    """

    start: int
    stop: int
    offset: int
    stack: str | None = None
    before: bool = True
    after: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens the rows of a model's embeddings stand for: those of ``first``, and with ``union`` of all members.

    A token that a member lacks has the row that ``new_rows`` says, where that is "theirs" in ``base`` first, if that is
    named. The rows are as many as the first model has, or the least ``multiple`` that holds all tokens.
    """

    first: str
    union: bool
    base: str | None
    members: tuple[str, ...]
    new_rows: str = "theirs"
    multiple: int | None = None


@dataclass(frozen=True)
class AdapterUse:
    """That a file is read as an adapter; ``base`` is the model that it changes, where that is said."""

    base: Model | None = None


@dataclass(frozen=True)
class MixturePart:
    """What a mixture of ``experts`` takes of a model, as ``role`` says: its attention, its MLPs or its router's gates.

    ``number`` is which expert it is; ``stated`` tells a shared expert that was asked for; ``seed`` is that of a router
    that is drawn.
    """

    role: str
    number: int = 0
    experts: int = 2
    per_token: int = 2
    style: str | None = None
    stated: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Model(Node):
    """A checkpoint, by path, by name in a models folder, or as tensors in memory.

    ``sha256`` locks it to one content; ``space`` is what its tensors mean; ``arch`` states its architecture where that
    shall not be inferred. ``layers`` is set where `stack_layers` reads a part of it, ``vocabulary`` where
    `align_vocabulary` puts its tokens in order, ``adapter`` where it stands for a difference, ``part`` where
    `mixture_of_experts` is made of it, ``permuted`` where `permute` and `rebasin` change the order of its axes, one
    after the other: no text says them of a model.
    """

    name: str
    sha256: str | None = None
    space: str = "weight"
    arch: str | None = None
    tensors: Mapping[str, Any] | None = field(default=None)
    span: Span | None = None
    layers: LayerRange | None = None
    vocabulary: Vocabulary | None = None
    adapter: AdapterUse | None = None
    part: MixturePart | None = None
    permuted: tuple[PermutedBy | AlignedTo, ...] | None = None

    def __reduce__(self) -> tuple[Callable[..., Node], tuple[object, ...]]:
        return Node.__reduce__(self)

    def __repr__(self) -> str:
        return f"model({self.name!r})"


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Value(Node):
    """A number, a text, block weights, or a number still to be searched."""

    value: Literal
    span: Span | None = None

    def __reduce__(self) -> tuple[Callable[..., Node], tuple[object, ...]]:
        return Node.__reduce__(self)

    def __repr__(self) -> str:
        return render_weight(self.value) if isinstance(self.value, Search) else repr(self.value)


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Parameter(Node):
    """A hole for a model or a recipe, filled by `compose`.

    ``name`` is dotted once a recipe that has parameters of its own was composed into another: the inner ``b`` of what
    filled ``a`` is ``a.b``, so that it is never taken for the outer ``b``.
    """

    name: str
    space: str = "weight"
    arch: str | None = None
    span: Span | None = None

    def __reduce__(self) -> tuple[Callable[..., Node], tuple[object, ...]]:
        return Node.__reduce__(self)

    def __repr__(self) -> str:
        return f"parameter({self.name!r})"


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Call(Node):
    """A merge method, by name, with its arguments in the order and by the names they were written."""

    method: str
    args: tuple[Node, ...] = ()
    kwargs: tuple[tuple[str, Node], ...] = ()
    span: Span | None = None
    spans: tuple[tuple[str, Span], ...] = ()
    """Where each keyword stands in the text."""

    @property
    def children(self) -> tuple[Node, ...]:
        if not self.kwargs:
            return self.args
        return (*self.args, *[node for _, node in self.kwargs])

    def with_children(self, children: Iterable[Node]) -> Call:
        """The same call of other nodes, in the order of `children`."""
        replaced = tuple(children)
        count = len(self.args)
        kwargs = tuple((name, node) for (name, _), node in zip(self.kwargs, replaced[count:], strict=True))
        return replace(self, args=replaced[:count], kwargs=kwargs)

    def __reduce__(self) -> tuple[Callable[..., Node], tuple[object, ...]]:
        return Node.__reduce__(self)

    def __repr__(self) -> str:
        names = [f"{len(self.args)} arguments"] if self.args else []
        return f"<call {self.method}({', '.join(names + [name for name, _ in self.kwargs])})>"


def multiply(left: Node, right: Node) -> Call:
    """``left * right``: a scale where one side is a number, a product otherwise."""
    if isinstance(right, Value):
        return Call("scale", (left,), (("alpha", right),))
    if isinstance(left, Value):
        return Call("scale", (right,), (("alpha", left),))
    return Call("multiply", (left, right))


def as_node(operand: Operand) -> Node:
    """A node for what a person writes: nodes stay, text and paths are models, numbers and block weights are values."""
    if isinstance(operand, Node):
        return operand
    if isinstance(operand, (str, os.PathLike)):
        return model(operand)
    return Value(literal(operand))


def literal(value: object) -> Literal:
    """A value that a recipe can hold; `RecipeError` for anything else, NaN and infinities included."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"a recipe's numbers are finite, but got {value!r}")
    if value is None or isinstance(value, (bool, int, float, str, BlockWeights, Search)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(literal(item) for item in value)
    raise RecipeError(
        f"a recipe holds numbers, texts, block weights and models, but got {type(value).__name__}",
        hint="wrap tensors in memory with model({...})" if isinstance(value, Mapping) else None,
    )


def model(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    sha256: str | None = None,
    space: str = "weight",
    arch: str | None = None,
    name: str | None = None,
) -> Model:
    """A checkpoint as a node, by path, by name in a models folder (suffix optional), or as a mapping of tensors.

    ``space`` is ``weight``, ``delta`` or ``param``; ``name`` is what to call tensors in memory. Nothing is opened.

    >>> model("deliberate_v2")
    model('deliberate_v2')
    """
    if space not in SPACES:
        raise RecipeError(f"a model's space is one of {', '.join(SPACES)}, but got {space!r}")
    if isinstance(source, Mapping):
        return Model(name or "memory", sha256=sha256, space=space, arch=arch, tensors=source)
    text = source if isinstance(source, str) else Path(source).as_posix()
    if not text or "\0" in text:
        raise RecipeError(f"a model's name is a path or a name in a models folder, but got {text!r}")
    return Model(text, sha256=sha256, space=space, arch=arch)


def parameter(name: str, *, space: str = "weight", arch: str | None = None) -> Parameter:
    """A hole for a model or a recipe, filled by `compose`.

    >>> parameter("a", space="delta")
    parameter('a')
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise RecipeError(f"a parameter's name is a word, or words joined by dots, but got {name!r}")
    if space not in SPACES:
        raise RecipeError(f"a parameter's space is one of {', '.join(SPACES)}, but got {space!r}")
    return Parameter(name, space=space, arch=arch)


def digests(order: Sequence[Node]) -> dict[int, bytes]:
    """A hash of each node by its identity, for nodes in an order as `topological` gives it."""
    found: dict[int, bytes] = {}
    for node in order:
        kind, fields, names = _content(node)
        parts = [kind.encode(), repr(fields).encode("utf-8", "surrogatepass")]
        if names:
            parts += [name.encode() + b"=" + found[id(child)] for name, child in zip(names, node.children, strict=True)]
        found[id(node)] = hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()
    return found


Row = tuple[str, tuple[object, ...], tuple[tuple[str, int], ...]]


def flatten(root: Node) -> list[Row]:
    """The graph as a table: kind, fields, and children by row, each row after those that it needs.

    Spans are left out: they say where a node was written, not what it means.
    """
    row_of: dict[int, int] = {}
    rows: list[Row] = []
    for node in topological(root):
        kind, fields, names = _content(node)
        children = tuple((name, row_of[id(child)]) for name, child in zip(names, node.children, strict=True))
        row_of[id(node)] = len(rows)
        rows.append((kind, fields, children))
    return rows


def _content(node: Node) -> tuple[str, tuple[object, ...], tuple[str, ...]]:
    """A node's kind, its own fields, and its children's names (empty for positional ones)."""
    if isinstance(node, Call):
        names = ("",) * len(node.args) + tuple([name for name, _ in node.kwargs])
        return "Call", (node.method, len(node.args)), names
    if isinstance(node, Value):
        return "Value", (node.value,), ()
    if isinstance(node, Model):
        held = None if node.tensors is None else _Tensors(node.tensors)
        views = (node.layers, node.vocabulary, node.adapter, node.part, node.permuted)
        part = () if all(view is None for view in views) else views
        return "Model", (node.name, node.sha256, node.space, node.arch, held, *part), ()
    if isinstance(node, Parameter):
        return "Parameter", (node.name, node.space, node.arch), ()
    raise RecipeError(f"{type(node).__name__} is not a kind of node", hint="Model, Value, Parameter or Call")


class _Tensors:
    """Tensors in memory inside a row: printed by identity, not by content."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors

    def __repr__(self) -> str:
        return f"tensors at {id(self.tensors)}"


def _unflatten(rows: list[Row]) -> Node:
    nodes: list[Node] = []
    for kind, fields, children in rows:
        if kind == "Call":
            method, count = fields
            picked = [(name, nodes[child]) for name, child in children]
            assert isinstance(method, str)
            assert isinstance(count, int)
            nodes.append(Call(method, tuple(node for _, node in picked[:count]), tuple(picked[count:])))
        elif kind == "Model":
            name, sha256, space, arch, held, *part = fields
            tensors = held.tensors if isinstance(held, _Tensors) else None
            nodes.append(Model(name, sha256, space, arch, tensors, None, *part))  # type: ignore[arg-type]
        else:
            nodes.append({"Value": Value, "Parameter": Parameter}[kind](*fields))
    return nodes[-1]
