"""A recipe's text cut into statements, one or more lines each, with the comments that stand before them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from remelt.text.source import DEEPEST_BRACKETS, MOST_OPERATORS, MOST_STATEMENTS, SourceText
from remelt.text.tokens import end_of_statement

_LONGEST_PLAIN = 400
_PLAIN = re.compile(
    r"""(?:[A-Za-z_]\w*+(?!["'])
    |[ \t=,()+*|-]
    |(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?(?![\w.])
    |"[\x20!\#-'*-\[\]-~]*+"(?![ \t]*["'])
    )++""",
    re.VERBOSE | re.ASCII,
)


class Statement(NamedTuple):
    """One statement's text, the number of its first line, and the comments on the lines before it."""

    text: str
    line: int
    comments: tuple[str, ...] = ()


def first_content(source: SourceText) -> tuple[str, int]:
    """The first line that is neither blank nor a comment, and its number; an empty text where there is none."""
    for number, line in enumerate(source.lines, start=1):
        content = line.strip(" \t")
        if content and not content.startswith("#"):
            return content, number
    return "", len(source.lines)


def comments_between(source: SourceText, first_line: int, end_line: int) -> tuple[str, ...]:
    """The comments that stand on lines of their own, from a line on, before another."""
    found = (line.strip(" \t") for line in source.lines[first_line - 1 : end_line - 1])
    return tuple(line for line in found if line.startswith("#"))


def split_statements(source: SourceText, first_line: int) -> Iterator[Statement]:
    """The statements from a line on, in the order of the text; comments after the last one are not given.

    Each holds the limits that keep Python's parser from deep recursion. Raises `RecipeSyntaxError` where one is broken,
    or a word or sign is none of a recipe's.
    """
    lines, index, count = source.lines, first_line - 1, 0
    comments: list[str] = []
    while index < len(lines):
        line = lines[index]
        last = index
        if not _is_plain(line):
            content = line.strip(" \t")
            if not content or content[0] == "#":
                if content:
                    comments.append(content)
                index += 1
                continue
            last = end_of_statement(source, index + 1) - 1
        count += 1
        if count > MOST_STATEMENTS:
            raise source.refuse(f"a recipe has at most {MOST_STATEMENTS} statements", index + 1)
        text = line if last == index else "\n".join(lines[index : last + 1])
        yield Statement(text, index + 1, tuple(comments))
        if comments:
            comments = []
        index = last + 1


def _is_plain(line: str) -> bool:
    """Whether a line is a statement by itself, and so short and simple that no limit can be broken in it.

    Most lines of long recipes are: they go to Python's parser without a look at each token.
    """
    return (
        0 < len(line) <= _LONGEST_PLAIN
        and line[0] not in " \t"
        and _PLAIN.fullmatch(line) is not None
        and (opened := line.count("(")) == line.count(")")
        and opened <= DEEPEST_BRACKETS
        and line.count("-") + line.count("+") + line.count("*") + line.count("|") <= MOST_OPERATORS
    )
