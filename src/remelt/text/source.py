"""A recipe's text by lines, the limits that it keeps, and the places in it that messages show."""

from __future__ import annotations

import re

from remelt.errors import RecipeSyntaxError, Span

MOST_CHARACTERS = 64 * 2**20
MOST_STATEMENTS = 1_000_000
LONGEST_STATEMENT = 2**20
LONGEST_TEXT = 2**16
LONGEST_NUMBER = 400
LONGEST_NAME = 400
MOST_DIGITS = 64
DEEPEST_BRACKETS = 64
MOST_OPERATORS = 64
MOST_NESTED_OPERATORS = 256

GRAMMAR = "a recipe is assignments, calls, literals and the operators + - * |"
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
_PIECE = 4096


class SourceText:
    """A recipe's text by lines, for messages that show the place.

    Raises `RecipeSyntaxError` for what is no text: too many characters, control characters, halves of surrogates.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        if len(text) > MOST_CHARACTERS:
            raise RecipeSyntaxError(f"{name}: a recipe has at most {MOST_CHARACTERS} characters, but got {len(text)}")
        self.lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._columns: dict[int, tuple[bytes, list[int]]] = {}
        if NOT_TEXT.search(text.replace("\r", "\n")):
            for number, line in enumerate(self.lines, start=1):
                if found := NOT_TEXT.search(line):
                    self.lines[number - 1] = NOT_TEXT.sub("\ufffd", line)
                    code, place = ord(found[0]), found.start() + 1
                    escape = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
                    raise self.refuse(
                        f"a recipe is text, but this character is U+{code:04X}",
                        number,
                        place,
                        hint=f"within quotes, write it as the escape {escape}"
                        if code and number > 1
                        else "is this a recipe?",
                    )

    def span(self, line: int, column: int, width: int = 1) -> Span:
        """A place by line and column, both from 1."""
        shown = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        return Span(self.name, shown, line, column, max(width, 1))

    def refuse(
        self, message: str, line: int, column: int = 1, width: int = 1, hint: str | None = None
    ) -> RecipeSyntaxError:
        """An error at a place."""
        return RecipeSyntaxError(message, hint=hint, span=self.span(line, column, width))

    def column(self, line: int, offset: int) -> int:
        """The column in characters, from 1, of an offset in UTF-8 bytes; the cost does not grow with the line."""
        text = self.lines[line - 1]
        if text.isascii():
            return offset + 1
        if line not in self._columns:
            if len(self._columns) > 64:
                self._columns.clear()
            encoded, before = text.encode(), [0]
            for start in range(0, len(encoded), _PIECE):
                before.append(before[-1] + _characters(encoded[start : start + _PIECE]))
            self._columns[line] = encoded, before
        encoded, before = self._columns[line]
        piece = offset // _PIECE
        return before[piece] + _characters(encoded[piece * _PIECE : offset]) + 1


def _characters(encoded: bytes) -> int:
    return len(encoded.translate(None, _CONTINUATION_BYTES))
