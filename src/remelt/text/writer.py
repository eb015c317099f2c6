"""From graph to text, in one canonical way: reading it back gives the same recipe, writing that the same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remelt.core.collection import collection_paused
from remelt.errors import RecipeError
from remelt.recipe.blocks import BlockWeights
from remelt.recipe.node import SPACES, Call, Model, Node, Parameter, Value, digests, model, parameter
from remelt.recipe.walk import topological
from remelt.text.constructors import CONSTRUCTORS
from remelt.text.document import Document
from remelt.text.literals import check_depth, is_word, quoted, write_literal
from remelt.text.names import Names
from remelt.text.source import LONGEST_STATEMENT, MOST_CHARACTERS, MOST_STATEMENTS, NOT_TEXT

WIDEST = 100
INLINE = 44
DEEPEST = 3
_OR, _SUM, _PRODUCT, _ATOM = range(4)
_SIGNS = {"add": ("+", _SUM), "subtract": ("-", _SUM), "multiply": ("*", _PRODUCT), "fallback": ("|", _OR)}
_PLAIN_OPERANDS = (Model, Parameter, Call)

Digest = bytes


@collection_paused()
def write_recipe(
    root: Node,
    *,
    names: Mapping[int, str] | None = None,
    comments: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """The recipe as text, version 1: models and shared steps by name, the rest nested up to a readable width.

    ``names`` gives nodes, by their identity, steps of their own with these names; ``comments`` the lines that stand
    before them. Raises `RecipeError` for tensors in memory, and for whatever else no text says.

    >>> print(write_recipe(model("a") + 0.5 * (model("b") - model("c"))), end="")
    version 1
    a = model("a")
    b = model("b")
    c = model("c")
    a + 0.5 * (b - c)
    """
    return _Writer(topological(root), names or {}, comments or {}).write()


def write_document(document: Document) -> str:
    """A recipe as a person wrote it, in the canonical layout: its steps in their order, their names, the comments."""
    needed = {id(node) for node in topological(document.result)}
    named = [step.node for step in document.steps if step.node is not None and id(step.node) in needed]
    writer = _Writer(topological(*named, document.result), document.names, document.comments)
    return writer.write(document.heading, document.closing, document.trailing)


class _Text:
    """An expression on its way: its text, how tightly it binds, how deep it nests, and its parts if it is a call."""

    __slots__ = ("binding", "depth", "head", "parts", "text")

    def __init__(self, text: str, binding: int, depth: int, head: str = "", parts: Sequence[str] = ()) -> None:
        self.text, self.binding, self.depth, self.head, self.parts = text, binding, depth, head, parts

    def lines(self, start: str) -> str:
        """A statement that ends in this expression, an argument a line where one line would be too wide."""
        if len(start) + len(self.text) <= WIDEST or not self.parts:
            return start + self.text
        arguments = "".join([f"    {part},\n" for part in self.parts])
        return f"{start}{self.head}(\n{arguments})"


class _Writer:
    """Writes each different step once: nodes that say the same are one, wherever they stand in the graph.

    ``order`` holds every node after those that it needs, the result last.
    """

    def __init__(self, order: list[Node], names: Mapping[int, str], comments: Mapping[int, Sequence[str]]) -> None:
        self.order = order
        for node in self.order:
            if isinstance(node, Value) and isinstance(node.value, tuple):
                check_depth(node.value)
        self.digest_of = digests(self.order)
        self.root = self.digest_of[id(order[-1])]
        self.given: dict[Digest, str] = {}
        self.comments: dict[Digest, list[str]] = {}
        self.value_names: dict[int, Digest] = {}
        self.texts: dict[Digest, _Text] = {}
        self.statements: list[str] = []
        self.characters = 0
        self.uses: dict[Digest, int] = {}
        self.count_uses(names, comments)
        self.names = Names(
            CONSTRUCTORS.union(self.given.values(), [node.method for node in self.order if isinstance(node, Call)])
        )

    def count_uses(self, names: Mapping[int, str], comments: Mapping[int, Sequence[str]]) -> None:
        """How often each different node is used; a value that was given a name is unlike any other."""
        given = Names(CONSTRUCTORS) if names else None
        counted: set[Digest] = set()
        for node in self.order:
            digest = self.digest_of[id(node)]
            if given is not None and (name := names.get(id(node))) is not None:
                if isinstance(node, Value):
                    digest = self.digest_of[id(node)] = digest + b"%d" % len(self.given)
                if digest not in self.given:
                    self.given[digest] = given.given(name)
            if lines := comments.get(id(node)):
                self.comments.setdefault(digest, []).extend(lines)
            if digest in counted:
                continue
            counted.add(digest)
            for child in node.children:
                below = self.digest_of[id(child)]
                self.uses[below] = self.uses.get(below, 0) + 1

    def write(self, heading: Sequence[str] = (), closing: Sequence[str] = (), trailing: Sequence[str] = ()) -> str:
        last = self.order[-1]
        if isinstance(last, Value) and isinstance(last.value, str):
            raise RecipeError("a text is no recipe: read back, it would be a model", hint="write model(...)")
        for line in heading:
            self.comment(line)
        self.add("version 1")
        for node in self.order:
            digest = self.digest_of[id(node)]
            if digest not in self.texts:
                self.texts[digest] = self.named(node, digest, self.expression(node))
        for line in (*closing, *(() if self.root in self.given else self.comments.get(self.root, ()))):
            self.comment(line)
        self.add(self.texts[self.root].lines(""))
        for line in trailing:
            self.comment(line)
        return "\n".join(self.statements) + "\n"

    def named(self, node: Node, digest: Digest, expression: _Text) -> _Text:
        """The expression, or the name of a step that is written for it."""
        name = self.given.get(digest)
        if name is None:
            if digest == self.root:
                return expression
            shared, short = self.uses.get(digest, 0) > 1, len(expression.text) <= INLINE
            if isinstance(node, Value) and (short or not shared):
                return expression
            if isinstance(node, Call) and not shared and short and expression.depth < DEEPEST:
                return expression
            name = self.names.of(node)
        for line in self.comments.get(digest, ()):
            self.comment(line)
        self.add(expression.lines(f"{name} = "))
        return _Text(name, _ATOM, 0)

    def comment(self, line: str) -> None:
        written = NOT_TEXT.sub(" ", " ".join(line.splitlines())).strip(" \t")
        self.add(written if written.startswith("#") else f"# {written}".rstrip(), statement=False)

    def add(self, text: str, *, statement: bool = True) -> None:
        self.characters += len(text) + 1
        if statement and len(text) > LONGEST_STATEMENT:
            raise RecipeError(
                f"a statement of a recipe's text has at most {LONGEST_STATEMENT} characters, but one has {len(text)}",
                hint="merge in several steps: a step of many arguments can take the results of smaller ones",
            )
        if self.characters > MOST_CHARACTERS or len(self.statements) > MOST_STATEMENTS:
            raise RecipeError(
                f"a recipe's text has at most {MOST_STATEMENTS} statements and {MOST_CHARACTERS} characters"
            )
        self.statements.append(text)

    def expression(self, node: Node) -> _Text:
        if isinstance(node, Model):
            if node.tensors is not None:
                raise RecipeError(
                    f"a text cannot hold tensors in memory, but the recipe uses them as {node.name!r}",
                    hint="save them to a file, and name that; or write parameter(...) in their place",
                )
            model(node.name, space=node.space)  # refuses what the reader would
            return _reference("model", node.name, sha256=node.sha256, space=node.space, arch=node.arch)
        if isinstance(node, Parameter):
            parameter(node.name, space=node.space)
            return _reference("parameter", node.name, space=node.space, arch=node.arch)
        if isinstance(node, Value):
            value = node.value
            combined = isinstance(value, BlockWeights) and len(value.rules) + (value.default is not None) > 1
            return _Text(write_literal(value), _OR if combined else _ATOM, 0)
        if not isinstance(node, Call):
            raise RecipeError(f"{type(node).__name__} is not a kind of node", hint="Model, Value, Parameter or Call")
        return self.operator(node) or self.call(node)

    def call(self, node: Call) -> _Text:
        for name in (node.method, *[name for name, _ in node.kwargs]):
            if not is_word(name):
                raise RecipeError(f"a recipe's text cannot say {name!r} as the name of a method or an argument")
        if node.method in CONSTRUCTORS:
            raise RecipeError(f"{node.method!r} is a word of recipes, and no method's name in a text")
        if len({name for name, _ in node.kwargs}) < len(node.kwargs):
            raise RecipeError(f"a call of {node.method!r} has an argument twice, which no text says")
        children = [self.texts[self.digest_of[id(child)]] for child in node.args]
        parts = [child.text for child in children]
        for name, child in node.kwargs:
            found = self.texts[self.digest_of[id(child)]]
            children.append(found)
            parts.append(f"{name}={found.text}")
        depth = 1 + max([child.depth for child in children], default=0)
        return _Text(f"{node.method}({', '.join(parts)})", _ATOM, depth, node.method, parts)

    def operator(self, node: Call) -> _Text | None:
        """The call in operator form, where that reads back as the same call."""
        if not all(isinstance(child, _PLAIN_OPERANDS) for child in node.args):
            return None
        if node.method in _SIGNS and len(node.args) == 2 and not node.kwargs:
            sign, binding = _SIGNS[node.method]
            left, right = (self.texts[self.digest_of[id(child)]] for child in node.args)
            text = f"{_wrapped(left, binding)} {sign} {_wrapped(right, binding + 1)}"
            return _Text(text, binding, 1 + max(left.depth, right.depth))
        if node.method == "scale" and len(node.args) == 1 and len(node.kwargs) == 1:
            name, alpha = node.kwargs[0]
            if name == "alpha" and isinstance(alpha, Value) and isinstance(alpha.value, (int, float)):
                if isinstance(alpha.value, bool):
                    return None
                number, operand = (self.texts[self.digest_of[id(child)]] for child in (alpha, node.args[0]))
                return _Text(f"{number.text} * {_wrapped(operand, _ATOM)}", _PRODUCT, operand.depth + 1)
        return None


def _wrapped(operand: _Text, binding: int) -> str:
    return operand.text if operand.binding >= binding else f"({operand.text})"


def _reference(word: str, first: str, **options: str | None) -> _Text:
    parts = [quoted(first)]
    for option, value in options.items():
        if value is not None and (option, value) != ("space", SPACES[0]):
            if not isinstance(value, str):
                raise RecipeError(f"{word} {first!r} has {option} {value!r}, which is no text")
            parts.append(f"{option}={quoted(value)}")
    return _Text(f"{word}({', '.join(parts)})", _ATOM, 0, word, parts)
