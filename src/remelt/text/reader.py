"""From text to graph. Which grammar a text is written in is told by its first line of content."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from remelt.core.collection import collection_paused
from remelt.recipe.node import Literal, Model, Node, literal
from remelt.text.constructors import VALUE_WORDS
from remelt.text.document import Document
from remelt.text.eras.reader import read_headerless, read_version_0_1
from remelt.text.expressions import Expressions
from remelt.text.mergekit import is_named_as_yaml, looks_like_mergekit, read_mergekit
from remelt.text.source import SourceText
from remelt.text.statements import Statement, comments_between, first_content, split_statements

_VERSION = re.compile(r"version[ \t]+([^\s#]+)[ \t]*(?:\#.*)?")
_OLDER_LINE = re.compile(r"""(?:model|parameter|literal|dict|merge|call|lora)[ \t]+["'&\w]""")
_NUMBER = re.compile(r"[+-]?(?:([0-9]+)|(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?)")
_VALUE_CALL = re.compile(rf"(?:{'|'.join(VALUE_WORDS)})[ \t]*\(|model\(")
_WORDS = {"true": True, "false": False, "none": None}


def read_recipe(text: str, source: str = "recipe") -> Node:
    """The recipe that a text says; ``source`` is its name in messages.

    Raises `RecipeSyntaxError` with line, column and remedy; no text makes it crash, hang or run anything.

    >>> read_recipe('version 1\\nweighted_sum("a", "b", alpha=0.3)')
    <call weighted_sum(2 arguments, alpha)>
    """
    return parse_document(text, source).result


def parse_document(text: str, source: str = "recipe") -> Document:
    """The recipe that a text says, with its steps' names and its comments.

    >>> [step.name for step in parse_document('version 1\\nx = f("a")\\nx').steps]
    ['x']
    """
    lines = SourceText(text, source)
    first, number = first_content(lines)
    for grammar in GRAMMARS:
        if grammar.recognises(first):
            with collection_paused():
                return grammar.read(lines, number)
    version = _VERSION.fullmatch(first)
    if version is not None:
        raise lines.refuse(
            f"version {version[1][:20]} of recipes is not known",
            number,
            1,
            len(first),
            "this remelt reads versions 1 and 0.1.0, and older recipes without a version; a newer one may read it",
        )
    if not first:
        raise lines.refuse("the recipe is empty", number, hint="it begins with the line: version 1")
    if is_named_as_yaml(source):
        return read_mergekit(lines, number)
    raise lines.refuse(
        "a recipe's first line states its version", number, 1, len(first), "begin with the line: version 1"
    )


def parse_value(text: str) -> Literal | Model:
    """A value as people type it on a command line: a number, true or false, block weights, a search; else a text.

    Quotes around it make anything a text; ``model("mask", space="param")`` is a model. Raises `RecipeError` for block
    weights, lists and models that are not well formed.

    >>> parse_value("0.3"), parse_value("true"), parse_value("fp16"), parse_value("blocks(IN00=0.2) | 0.33")
    (0.3, True, 'fp16', blocks(IN00=0.2) | 0.33)
    """
    stripped = text.strip()
    if stripped.lower() in _WORDS:
        return _WORDS[stripped.lower()]
    lines = SourceText(stripped, "value")
    number = _NUMBER.fullmatch(stripped)
    if number is not None and len(stripped) <= 64:
        return literal(int(stripped) if number[1] else float(stripped))
    listed = stripped.startswith("[") and stripped.endswith("]")
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "\"'"
    if not (listed or quoted or number or _VALUE_CALL.match(stripped)):
        return text
    expressions = Expressions(lines)
    (statement, *more) = split_statements(lines, 1)
    if more:
        raise lines.refuse("a value is one expression", more[0].line)
    return expressions.value(statement)


@dataclass(frozen=True)
class Grammar:
    """A way in which recipes have been written: how its first line of content looks, and its reader."""

    title: str
    recognises: Callable[[str], bool]
    read: Callable[[SourceText, int], Document]


def _read_version_1(lines: SourceText, version_line: int) -> Document:
    expressions = Expressions(lines)
    result: tuple[Statement, Node] | None = None
    for statement in split_statements(lines, version_line + 1):
        if result is not None:
            unused = result[0]
            raise lines.refuse(
                "this result is never used: only the last statement stands without a name",
                unused.line,
                width=len(unused.text.split("\n", 1)[0]),
                hint="give it a name, as in: step = ...",
            )
        node = expressions.take(statement)
        if node is not None:
            result = statement, node
    steps = tuple(expressions.steps.values())
    if result is None:
        if not steps:
            hint = "its last line is the result"
            raise lines.refuse("the recipe says nothing after its version", version_line, hint=hint)
        name = steps[-1].name
        raise lines.refuse(
            "a recipe's last statement is its result, without a name",
            steps[-1].line,
            width=len(name),
            hint=f"add the line: {name}",
        )
    last, root = result
    after = last.line + last.text.count("\n") + 1
    return Document(
        root,
        steps,
        heading=comments_between(lines, 1, version_line),
        closing=last.comments,
        trailing=comments_between(lines, after, len(lines.lines) + 1),
    )


def _states_version(version: str) -> Callable[[str], bool]:
    def recognises(line: str) -> bool:
        found = _VERSION.fullmatch(line)
        return found is not None and found[1] == version

    return recognises


def _is_headerless(line: str) -> bool:
    return _OLDER_LINE.match(line) is not None


GRAMMARS = (
    Grammar("version 1", _states_version("1"), _read_version_1),
    Grammar("version 0.1.0", _states_version("0.1.0"), read_version_0_1),
    Grammar("headerless", _is_headerless, read_headerless),
    Grammar("mergekit's YAML", looks_like_mergekit, read_mergekit),
)
"""The grammars by the first line of content, in the order in which they are asked."""
