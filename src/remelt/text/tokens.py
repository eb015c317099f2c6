"""The words and signs of a recipe: what may stand in a statement, and how much of it.

Python's parser sees only statements that passed here, or are too short and plain to need it, so that its own limits are
never met.
"""

from __future__ import annotations

import keyword
import re
from typing import NamedTuple

from remelt.errors import RecipeSyntaxError
from remelt.text.source import (
    DEEPEST_BRACKETS,
    GRAMMAR,
    LONGEST_NAME,
    LONGEST_NUMBER,
    LONGEST_STATEMENT,
    LONGEST_TEXT,
    MOST_DIGITS,
    MOST_NESTED_OPERATORS,
    MOST_OPERATORS,
    SourceText,
)

_TOKEN = re.compile(
    r"""(?P<space>[ \t]++)
    |(?P<name>[^\W0-9]\w*+)
    |(?P<number>(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][-+]?[0-9]++)?)
    |(?P<string>"(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+')
    |(?P<comment>\#.*+)
    |(?P<open>[(\[{])
    |(?P<close>[)\]}])
    |(?P<foreign>\*\*=?|:=|==|!=|<=|>=|->|//=?|<<=?|>>=?|\|\||&&|[-+*|/%@&^]=|\.\.\.)
    |(?P<operator>[-+*|])
    |(?P<sign>[,:=])
    |(?P<continuation>\\$)
    |(?P<other>.)""",
    re.VERBOSE,
)
_PAIRS = {")": "(", "]": "[", "}": "{"}
_CLOSING = {opening: closing for closing, opening in _PAIRS.items()}
_ESCAPE = re.compile(
    r"""\\(?:([\\'"abfnrtv]|[0-3]?[0-7]{1,2}(?![0-7])|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:10|0[0-9a-fA-F])[0-9a-fA-F]{4})|.?)"""
)
WITH_EXPONENT = "write it with an exponent, as in 1e80"
ALLOWED_WORDS = {"True", "False", "None"}
_FOREIGN = {
    ".": "a dot after a name",
    "...": "an ellipsis",
    ";": "a semicolon",
    ":=": "an assignment inside an expression",
    "->": "an arrow",
    "@": "an at sign",
    "!": "an exclamation mark",
    "\\": "a backslash within a line",
} | dict.fromkeys(("==", "!=", "<", ">", "<=", ">="), "a comparison")
_SPACES = "\xa0\u2002\u2003\u2009\u200b\u202f\u3000"
_FOREIGN |= dict.fromkeys(_SPACES, "a space of another kind")
_FOREIGN_HINTS = {
    ".": 'a method is called by its name alone; what has dots stands in quotes, as in "double_blocks.3" or "a.ckpt"',
    ";": "each statement stands on a line of its own",
    "\\": "it stands only at the end of a line that goes on in the next",
    "==": "one = gives a step or an argument its value",
    "/": "multiply by the inverse, as in 0.5 * a; a path stands in quotes",
    "**": "a power is written as a product, arguments one by one",
    "//": "a comment begins with #; to divide, multiply by the inverse",
    "&": "a step is used by its name, as in: a = model(...), and then f(a)",
    "%": "a share is a number such as 0.3",
    "\u00d7": "write *",
    "\u00b7": "write *",
}
_FOREIGN_HINTS |= dict.fromkeys(("+=", "-=", "*=", "|="), "give what comes of it another name, as in: c = a + b")
_FOREIGN_HINTS |= dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "write a plain minus: -")
_FOREIGN_HINTS |= dict.fromkeys(_SPACES, "write a plain space")
_FOREIGN_HINTS |= dict.fromkeys("\u201c\u201d\u201e\u2018\u2019`\u00b4", 'texts stand in straight quotes: "..."')


class Token(NamedTuple):
    """A word or sign with its place, line and column from 1."""

    kind: str
    text: str
    line: int
    column: int

    @property
    def end(self) -> tuple[int, int]:
        """The line and column right after it."""
        return self.line, self.column + len(self.text)


def end_of_statement(source: SourceText, first_line: int) -> int:
    """The last line of the statement that begins on a line; `RecipeSyntaxError` for what no recipe may hold."""
    return Scanner(source).scan(first_line)


class Scanner:
    """One pass over a statement's tokens that holds the limits and refuses what is none of a recipe's."""

    def __init__(self, source: SourceText) -> None:
        self.source = source
        self.opened: list[Token] = []
        self.operators = [0]
        self.tokens: list[Token] = []

    def scan(self, first_line: int) -> int:
        lines, number, length = self.source.lines, first_line, 0
        if lines[number - 1][:1] in (" ", "\t"):
            raise self.source.refuse("a statement begins at the start of its line", number, hint="remove the spaces")
        while True:
            line = lines[number - 1]
            length += len(line) + 1
            if length > LONGEST_STATEMENT:
                raise self.source.refuse(
                    f"a statement has at most {LONGEST_STATEMENT} characters",
                    first_line,
                    hint="give a part a name of its own on a line before",
                )
            continued = self.scan_line(line, number)
            if number == len(lines) or not (self.opened or continued):
                break
            number += 1
        if self.opened:
            bracket = self.opened[-1]
            raise self.refuse(f"{bracket.text!r} is never closed", bracket, f"add {_CLOSING[bracket.text]!r}")
        return number

    def scan_line(self, line: str, number: int) -> bool:
        """Take a line's tokens; whether a backslash says that the statement goes on."""
        for match in _TOKEN.finditer(line):
            kind = str(match.lastgroup)
            if kind in ("space", "comment"):
                continue
            token = Token(kind, match[0], number, match.start() + 1)
            if kind == "continuation":
                return True
            self.check(token, self.tokens[-1] if self.tokens else None, line[match.end() : match.end() + 1])
            self.tokens.append(token)
        return False

    def check(self, token: Token, before: Token | None, following: str) -> None:
        kind = token.kind
        if kind == "name":
            self.name(token, following)
        elif kind == "number":
            self.number(token, before, following)
        elif kind == "string":
            if before is not None and before.kind == "string":
                raise self.refuse("a comma is missing between two texts", token, "write it, or make one text of both")
            self.string(token, before)
        elif kind == "open":
            self.opened.append(token)
            self.operators.append(0)
            if len(self.opened) > DEEPEST_BRACKETS:
                hint = "give an inner part a name of its own on a line before"
                raise self.refuse(f"brackets nest deeper than {DEEPEST_BRACKETS}", token, hint)
        elif kind == "close":
            if not self.opened:
                raise self.refuse(f"{token.text!r} closes nothing", token, "remove it, or open a bracket before")
            last = self.opened[-1]
            if last.text != _PAIRS[token.text]:
                hint = f"{last.text!r} was opened at line {last.line}, column {last.column}: close it first"
                raise self.refuse(f"{token.text!r} does not close {last.text!r}", token, hint)
            self.opened.pop()
            self.operators.pop()
        elif kind == "operator":
            self.operators[-1] += 1
            if self.operators[-1] > MOST_OPERATORS:
                hint = "give a part a name of its own on a line before"
                raise self.refuse(f"more than {MOST_OPERATORS} operators in one expression", token, hint)
            if sum(self.operators) > MOST_NESTED_OPERATORS:
                hint = "give an inner part a name of its own on a line before"
                raise self.refuse(f"more than {MOST_NESTED_OPERATORS} operators around each other", token, hint)
        elif token.text == ",":
            self.operators[-1] = 0
        elif kind in ("foreign", "other"):
            raise self.foreign(token)

    def name(self, token: Token, following: str) -> None:
        word = token.text
        if len(word) > LONGEST_NAME:
            raise self.refuse(f"a name has at most {LONGEST_NAME} characters", token)
        if following and following in "\"'" and word.lower() != "r":
            what = {"f": "a formatted text", "b": "a text of bytes"}.get(word.lower(), f"{word!r} before a text")
            raise self.refuse(f"{what} is not part of a recipe", token, 'a text is "...", or r"..." for backslashes')
        if keyword.iskeyword(word) and word not in ALLOWED_WORDS:
            rest = self.source.lines[token.line - 1][token.column - 1 + len(word) :].lstrip(" \t")
            hint = GRAMMAR
            if rest.startswith("=") and self.opened:
                hint = f'the name of a block or component stands in quotes: {{"{word}": 0.5}}'
            elif rest.startswith("="):
                hint = "give this step another name"
            raise self.refuse(f"{word!r} is a word of Python that a recipe does not use", token, hint)
        if not word.isascii() and not word.isidentifier():
            valid = next(end for end in range(len(word), -1, -1) if not end or word[:end].isidentifier())
            hint = "a name is a letter, then letters, digits and _"
            raise self.refuse(f"{word[valid]!r} does not belong in a name", token, hint)

    def number(self, token: Token, before: Token | None, following: str) -> None:
        text = token.text
        if text[0] == "." and before is not None and before.kind == "name" and before.end == token[2:]:
            raise self.foreign(token._replace(text="."))
        if following and (following == "." or following == "_" or following.isalnum()):
            raise self.refuse(
                "a number is digits, with a point and an exponent at most",
                token,
                "as in 12, 0.5 or 1e-3; a name begins with a letter",
            )
        if text.isdigit():
            if len(text) > MOST_DIGITS:
                raise self.refuse(f"a whole number has at most {MOST_DIGITS} digits", token, WITH_EXPONENT)
            if text[0] == "0" and len(text) > 1:
                raise self.refuse("a whole number does not begin with 0", token, f"write {int(text)}")
        elif len(text) > LONGEST_NUMBER:
            raise self.refuse(f"a number has at most {LONGEST_NUMBER} characters", token)

    def string(self, token: Token, before: Token | None) -> None:
        if len(token.text) > LONGEST_TEXT:
            raise self.refuse(f"a text has at most {LONGEST_TEXT} characters", token._replace(text='"'))
        prefix = token._replace(kind="name", column=token.column - 1, text=token.text)
        if "\\" not in token.text or (before is not None and before[2:] == prefix[2:] and before.text in "rR"):
            return
        for escape in _ESCAPE.finditer(token.text):
            if escape[1] is None:
                place = Token("escape", escape[0], token.line, token.column + escape.start())
                hint = 'write \\\\ for a backslash, / in paths, or r"..." before a text with many'
                raise self.refuse(f"{escape[0]} is not an escape that a text knows", place, hint)

    def foreign(self, token: Token) -> RecipeSyntaxError:
        text = token.text
        if text in "\"'":
            width = len(self.source.lines[token.line - 1]) - token.column + 1
            span = self.source.span(token.line, token.column, width)
            return RecipeSyntaxError(
                "a text is not closed on its line", hint=f"close it with {text}; \\n stands for a new line", span=span
            )
        hint = _FOREIGN_HINTS.get(text)
        if text in _FOREIGN:
            return self.refuse(f"{_FOREIGN[text]} is not part of a recipe", token, hint or GRAMMAR)
        if text[0] in "+-*/|%&^<>":
            known = "only the operators + - * | are understood"
            return self.refuse(f"{text!r} is not part of a recipe", token, hint or known)
        return self.refuse(f"{text!r} is not part of a recipe", token, hint or GRAMMAR)

    def refuse(self, message: str, token: Token, hint: str | None = None) -> RecipeSyntaxError:
        return self.source.refuse(message, token.line, token.column, len(token.text), hint)
