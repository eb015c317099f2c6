"""From graph to text, in one canonical way: reading it back gives the same recipe, writing that the same text."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from remelt.errors import RecipeError
from remelt.recipe.blocks import BlockWeights, Search, render_weight
from remelt.recipe.node import Call, Literal, Model, Node, Parameter, Value, digests
from remelt.recipe.walk import topological
from remelt.text.reader import CONSTRUCTORS

WIDEST = 88
DEEPEST = 3
_OR, _SUM, _PRODUCT, _ATOM = range(4)
_SIGNS = {"add": ("+", _SUM), "subtract": ("-", _SUM), "fallback": ("|", _OR)}


def write_recipe(root: Node) -> str:
    """The recipe as text, version 1: models and shared steps by name, the rest nested up to a readable width.

    Raises `RecipeError` for tensors in memory, which no text holds.

    >>> from remelt.recipe.node import model
    >>> print(write_recipe(model("a") + 0.5 * (model("b") - model("c"))), end="")
    version 1
    a = model("a")
    b = model("b")
    c = model("c")
    a + 0.5 * (b - c)
    """
    return _Writer(root).write()


class _Text:
    """An expression on its way: its text, how tightly it binds, how deep it nests."""

    __slots__ = ("binding", "depth", "text")

    def __init__(self, text: str, binding: int, depth: int) -> None:
        self.text, self.binding, self.depth = text, binding, depth


class _Writer:
    def __init__(self, root: Node) -> None:
        self.root = root
        self.order = topological(root)
        self.digest_of: Mapping[int, bytes] = digests(self.order)
        self.lines = ["version 1"]
        self.texts: dict[bytes, _Text] = {}
        self.taken: set[str] = set()
        self.steps = 0
        self.uses: dict[bytes, int] = {}
        counted: set[bytes] = set()
        for node in self.order:
            digest = self.digest_of[id(node)]
            if digest not in counted:
                counted.add(digest)
                for child in node.children:
                    below = self.digest_of[id(child)]
                    self.uses[below] = self.uses.get(below, 0) + 1

    def write(self) -> str:
        for node in self.order:
            digest = self.digest_of[id(node)]
            if digest not in self.texts:
                self.texts[digest] = self.named(node, digest, self.expression(node))
        self.lines.append(self.texts[self.digest_of[id(self.root)]].text)
        return "\n".join(self.lines) + "\n"

    def named(self, node: Node, digest: bytes, expression: _Text) -> _Text:
        """The expression, or the name of a step that was written for it."""
        if node is self.root or isinstance(node, Value):
            return expression
        shared = self.uses.get(digest, 0) > 1
        if isinstance(node, Call) and not shared and expression.depth < DEEPEST and len(expression.text) <= WIDEST // 2:
            return expression
        name = self.name_of(node)
        self.lines.append(f"{name} = {expression.text}")
        return _Text(name, _ATOM, 0)

    def name_of(self, node: Node) -> str:
        if isinstance(node, Call):
            while True:
                self.steps += 1
                if (name := f"step{self.steps}") not in self.taken:
                    break
        else:
            wanted = node.name.replace(".", "_") if isinstance(node, Parameter) else PurePosixPath(node.name).stem  # type: ignore[attr-defined]
            wanted = re.sub(r"\W+", "_", wanted, flags=re.ASCII).strip("_")
            if not wanted or wanted[0].isdigit():
                wanted = f"model_{wanted}".rstrip("_")
            if keyword.iskeyword(wanted) or wanted in CONSTRUCTORS or wanted == "version":
                wanted += "_"
            name, number = wanted, 1
            while name in self.taken:
                number += 1
                name = f"{wanted}_{number}"
        self.taken.add(name)
        return name

    def expression(self, node: Node) -> _Text:
        if isinstance(node, Model):
            if node.tensors is not None:
                raise RecipeError(
                    f"a text cannot hold tensors in memory, but the recipe uses them as {node.name!r}",
                    hint="save them to a file, and name that; or write parameter(...) in their place",
                )
            options = {
                "sha256": node.sha256,
                "space": node.space if node.space != "weight" else None,
                "arch": node.arch,
            }
            return _Text(_constructor("model", node.name, options), _ATOM, 0)
        if isinstance(node, Parameter):
            options = {"space": node.space if node.space != "weight" else None, "arch": node.arch}
            return _Text(_constructor("parameter", node.name, options), _ATOM, 0)
        if isinstance(node, Value):
            return _Text(write_literal(node.value), _ATOM, 0)
        assert isinstance(node, Call)
        return self.operator(node) or self.call(node)

    def call(self, node: Call) -> _Text:
        children = [self.texts[self.digest_of[id(child)]] for child in node.args]
        parts = [child.text for child in children]
        for name, child in node.kwargs:
            found = self.texts[self.digest_of[id(child)]]
            children.append(found)
            parts.append(f"{name}={found.text}")
        depth = 1 + max((child.depth for child in children), default=0)
        return _Text(f"{node.method}({', '.join(parts)})", _ATOM, depth)

    def operator(self, node: Call) -> _Text | None:
        """The call in operator form, where that reads back as the same call."""
        if any(isinstance(child, Value) for child in node.args):
            return None
        if node.method in _SIGNS and len(node.args) == 2 and not node.kwargs:
            sign, binding = _SIGNS[node.method]
            return self.binary(sign, binding, node)
        if node.method == "multiply" and len(node.args) == 2 and not node.kwargs:
            return self.binary("*", _PRODUCT, node)
        if node.method == "scale" and len(node.args) == 1 and len(node.kwargs) == 1:
            name, alpha = node.kwargs[0]
            number = (
                isinstance(alpha, Value) and isinstance(alpha.value, (int, float)) and not isinstance(alpha.value, bool)
            )
            if name == "alpha" and number:
                operand = self.texts[self.digest_of[id(node.args[0])]]
                text = f"{write_literal(alpha.value)} * {_wrapped(operand, _ATOM)}"  # type: ignore[attr-defined]
                return _Text(text, _PRODUCT, operand.depth + 1)
        return None

    def binary(self, sign: str, binding: int, node: Call) -> _Text:
        left, right = (self.texts[self.digest_of[id(child)]] for child in node.args)
        text = f"{_wrapped(left, binding)} {sign} {_wrapped(right, binding + 1)}"
        return _Text(text, binding, 1 + max(left.depth, right.depth))


def _wrapped(operand: _Text, binding: int) -> str:
    return operand.text if operand.binding >= binding else f"({operand.text})"


def _constructor(name: str, first: str, options: Mapping[str, str | None]) -> str:
    given = "".join(f", {option}={_quoted(value)}" for option, value in options.items() if value is not None)
    return f"{name}({_quoted(first)}{given})"


def write_literal(value: Literal) -> str:
    """A value as a recipe writes it.

    >>> write_literal(("a", 0.5, None))
    '["a", 0.5, None]'
    """
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, tuple):
        return f"[{', '.join(write_literal(item) for item in value)}]"
    if isinstance(value, Search):
        return render_weight(value)
    if isinstance(value, BlockWeights) and not value.rules:
        raise RecipeError("block weights without any rule cannot be written: write the plain number")
    return repr(value)


def _quoted(text: str) -> str:
    """A text in double quotes; what does not print is escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    if quoted.isprintable():
        return quoted
    return "".join(character if character.isprintable() else _escaped(character) for character in quoted)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
