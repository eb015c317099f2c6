"""A recipe's text cut into statements, and every limit held before Python's parser sees any of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from remelt.errors import RecipeSyntaxError, Span

MOST_CHARACTERS = 64 * 2**20
MOST_STATEMENTS = 1_000_000
LONGEST_STATEMENT = 2**20
DEEPEST_BRACKETS = 64
MOST_OPERATORS = 64

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<open>[(\[{])
    |(?P<close>[)\]}])
    |(?P<newline>\n)
    |(?P<operator>[-+*|])
    |(?P<comma>,)
    |(?P<quote>["'])
    |(?P<other>[^\#"'()\[\]{}\n\-+*|,]+)""",
    re.VERBOSE,
)
_PAIRS = {")": "(", "]": "[", "}": "{"}
_VERSION = re.compile(r"version[ \t]+(\S+)[ \t]*(?:\#.*)?")


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement's text and the number of its first line, from 1."""

    text: str
    line: int


class SourceText:
    """A recipe's text by lines, for messages that show the place."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        self.lines = self.text.split("\n")

    def span(self, line: int, column: int, width: int = 1) -> Span:
        """A place by line and column, both from 1."""
        shown = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        return Span(self.name, shown, line, column, max(width, 1))

    def refuse(
        self, message: str, line: int, column: int = 1, width: int = 1, hint: str | None = None
    ) -> RecipeSyntaxError:
        """An error at a place."""
        return RecipeSyntaxError(message, hint=hint, span=self.span(line, column, width))


def version_of(source: SourceText) -> tuple[str | None, int]:
    """The version that the first line with content states, and that line's number; None where it states none."""
    for number, line in enumerate(source.lines, start=1):
        content = line.strip()
        if content and not content.startswith("#"):
            match = _VERSION.fullmatch(content)
            return (match[1] if match else None), number
    return None, len(source.lines)


def split_statements(source: SourceText, first_line: int) -> Iterator[Statement]:
    """The statements from a line on; `RecipeSyntaxError` where a limit or a bracket is broken."""
    return _Splitter(source, first_line).statements()


class _Splitter:
    def __init__(self, source: SourceText, first_line: int) -> None:
        self.source = source
        self.line = first_line
        self.text = "\n".join(source.lines[first_line - 1 :])
        self.line_start = 0
        self.opened: list[tuple[str, int, int]] = []
        self.operators = [0]
        self.count = 0

    def statements(self) -> Iterator[Statement]:
        start, start_line, content = 0, self.line, False
        for match in _TOKEN.finditer(self.text):
            kind, place = match.lastgroup, match.start()
            if kind == "newline":
                if not self.opened and not self.continued(place):
                    if content:
                        yield self.statement(start, place, start_line)
                    start, start_line, content = match.end(), self.line + 1, False
                    self.operators = [0]
                self.line += 1
                self.line_start = match.end()
            elif kind == "other":
                content = content or not match[0].isspace()
            elif kind != "comment":
                content = True
                self.track(kind or "", match[0], place)
        if self.opened:
            bracket, line, column = self.opened[-1]
            raise self.source.refuse(f"{bracket!r} is never closed", line, column)
        if content:
            yield self.statement(start, len(self.text), start_line)

    def continued(self, place: int) -> bool:
        return place > 0 and self.text[place - 1] == "\\"

    def track(self, kind: str, token: str, place: int) -> None:
        column = place - self.line_start + 1
        if kind == "open":
            self.opened.append((token, self.line, column))
            self.operators.append(0)
            if len(self.opened) > DEEPEST_BRACKETS:
                hint = "give an inner part a name of its own on a line before"
                raise self.source.refuse(f"brackets nest deeper than {DEEPEST_BRACKETS}", self.line, column, hint=hint)
        elif kind == "close":
            if not self.opened or self.opened[-1][0] != _PAIRS[token]:
                raise self.source.refuse(f"{token!r} closes nothing", self.line, column)
            self.opened.pop()
            self.operators.pop()
        elif kind == "operator":
            self.operators[-1] += 1
            if self.operators[-1] > MOST_OPERATORS:
                hint = "give a part a name of its own on a line before"
                raise self.source.refuse(
                    f"more than {MOST_OPERATORS} operators in one expression", self.line, column, hint=hint
                )
        elif kind == "comma":
            self.operators[-1] = 0
        elif kind == "quote":
            raise self.source.refuse("a text is not closed on its line", self.line, column)

    def statement(self, start: int, end: int, line: int) -> Statement:
        self.count += 1
        if self.count > MOST_STATEMENTS:
            raise self.source.refuse(f"a recipe has at most {MOST_STATEMENTS} statements", line)
        if end - start > LONGEST_STATEMENT:
            raise self.source.refuse(f"a statement has at most {LONGEST_STATEMENT} characters", line)
        text = self.text[start:end]
        if text[0] in " \t":
            raise self.source.refuse("a statement begins at the start of its line", line, hint="remove the indentation")
        return Statement(text, line)
