"""A recipe as a picture in words: Mermaid for pages that render it, Graphviz's dot for its tools."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remelt.recipe.node import Call, Model, Node, Parameter, Value, digests
from remelt.recipe.walk import topological
from remelt.text.literals import write_literal
from remelt.text.names import Names

LONGEST = 60
"""Characters of a line of a label: what is longer is cut."""

ArgumentNames = Callable[[Call], Sequence[str]]


@dataclass(frozen=True)
class Box:
    """A node of the picture: its lines, and whether it is a ``model``, ``parameter``, ``step`` or the ``result``."""

    name: str
    lines: tuple[str, ...]
    kind: str
    layer: int


@dataclass(frozen=True)
class Arrow:
    """From what is used to what uses it, with the argument's name where there are several."""

    start: str
    end: str
    label: str = ""


@dataclass(frozen=True)
class Diagram:
    """The boxes of a recipe, each after those that it is computed from, and the arrows between them."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def diagram(root: Node, names: ArgumentNames | None = None) -> Diagram:
    """The picture of a recipe; numbers and texts stand in the box of the call that takes them.

    ``names`` gives the names of a call's arguments by position; without it they are counted.
    """
    order = topological(root)
    digest_of = digests(order)
    boxes: dict[bytes, Box] = {}
    arrows: list[Arrow] = []
    for node in order:
        digest = digest_of[id(node)]
        if digest in boxes or (isinstance(node, Value) and node is not root):
            continue
        name = f"n{len(boxes)}"
        if not isinstance(node, Call):
            kind = "model" if isinstance(node, Model) else "parameter" if isinstance(node, Parameter) else "step"
            boxes[digest] = Box(name, _lines(node), kind, 0)
            continue
        positions = list(names(node)) if names is not None else []
        positions += [str(place + 1) for place in range(len(positions), len(node.args))]
        given = [*zip(positions, node.args, strict=False), *node.kwargs]
        operands = [(label, child) for label, child in given if not isinstance(child, Value)]
        lines = [node.method]
        lines += [_cut(f"{label} = {_value(child)}") for label, child in given if isinstance(child, Value)]
        layer = 1 + max((boxes[digest_of[id(child)]].layer for _, child in operands), default=0)
        boxes[digest] = Box(name, tuple(lines), "result" if node is root else "step", layer)
        for label, child in operands:
            arrows.append(Arrow(boxes[digest_of[id(child)]].name, name, label if len(operands) > 1 else ""))
    return Diagram(tuple(boxes.values()), tuple(arrows))


def mermaid(picture: Diagram) -> str:
    """The picture as a Mermaid flowchart, from left to right.

    >>> from remelt.recipe.node import model
    >>> print(mermaid(diagram(model("a") - model("b"))), end="")
    flowchart LR
        n0["a"]
        n1["b"]
        n2(["subtract"])
        n0 -- "1" --> n2
        n1 -- "2" --> n2
    """
    shapes = {"model": '["{}"]', "parameter": '{{{{"{}"}}}}', "step": '("{}")', "result": '(["{}"])'}
    written = ["flowchart LR"]
    for box in picture.boxes:
        label = "<br/>".join(_escaped(line) for line in box.lines)
        written.append(f"    {box.name}{shapes[box.kind].format(label)}")
    for arrow in picture.arrows:
        label = f' -- "{_escaped(arrow.label)}"' if arrow.label else ""
        written.append(f"    {arrow.start}{label} --> {arrow.end}")
    return "\n".join(written) + "\n"


def dot(picture: Diagram) -> str:
    """The picture as a directed graph in Graphviz's language.

    >>> from remelt.recipe.node import model
    >>> print(dot(diagram(model("a"))), end="")
    digraph recipe {
        rankdir=LR;
        n0 [label="a", shape=box];
    }
    """
    shapes = {"model": "box", "parameter": "hexagon", "step": "ellipse", "result": "doubleoctagon"}
    written = ["digraph recipe {", "    rankdir=LR;"]
    for box in picture.boxes:
        label = "\\n".join(_dotted(line) for line in box.lines)
        written.append(f'    {box.name} [label="{label}", shape={shapes[box.kind]}];')
    for arrow in picture.arrows:
        label = f' [label="{_dotted(arrow.label)}"]' if arrow.label else ""
        written.append(f"    {arrow.start} -> {arrow.end}{label};")
    return "\n".join([*written, "}"]) + "\n"


def _lines(node: Node) -> tuple[str, ...]:
    if isinstance(node, Model):
        space = () if node.space == "weight" else (node.space,)
        return (_cut(Names([]).of_model(node.name) if len(node.name) > LONGEST else node.name), *space)
    if isinstance(node, Parameter):
        return (_cut(node.name), *(() if node.space == "weight" else (node.space,)))
    assert isinstance(node, Value)
    return (_cut(_value(node)),)


def _value(node: Value) -> str:
    return write_literal(node.value)


def _cut(line: str) -> str:
    line = "".join(char if char.isprintable() else " " for char in line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def _escaped(text: str) -> str:
    """A text as a label of Mermaid, which knows the entities of HTML, but reads a backquote as Markdown."""
    return html.escape(text).replace("`", "&#96;").replace("#", "&#35;").replace("&&#35;", "&#")


def _dotted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
