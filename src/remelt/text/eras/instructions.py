"""Instructions, one a line: a command, words and texts in quotes, some of them after a name and an equals sign."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from remelt.errors import RecipeSyntaxError
from remelt.text.source import LONGEST_STATEMENT, LONGEST_TEXT, MOST_STATEMENTS, SourceText

_WORD = {
    False: re.compile(r'(?P<bare>[^\s"]*)(?P<quote>"(?P<text>[^"]*)(?P<end>")?)?'),
    True: re.compile(r'(?P<bare>(?:[^\s"\\]|\\.)*\\?)(?P<quote>"(?P<text>(?:[^"\\]|\\.)*\\?)(?P<end>")?)?'),
}
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Word:
    """A word of an instruction, without its quotes, escapes and name; where it begins, and how wide it is."""

    text: str
    quoted: bool
    column: int
    width: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    """A line: its command, the words without a name, those with one, and the comments on the lines before."""

    command: Word
    words: tuple[Word, ...]
    named: tuple[Word, ...]
    line: int
    comments: tuple[str, ...]


def instructions(source: SourceText, first_line: int, *, escapes: bool) -> Iterator[Instruction]:
    """The instructions from a line on; blank lines and comments may stand between them.

    With ``escapes`` a backslash stands before a character that means itself; without, it is one like any other.
    """
    comments: list[str] = []
    count = 0
    for number, line in enumerate(source.lines[first_line - 1 :], start=first_line):
        content = line.strip(" \t")
        if not content:
            continue
        if content[0] == "#":
            comments.append(content)
            continue
        count += 1
        if count > MOST_STATEMENTS:
            raise source.refuse(f"a recipe has at most {MOST_STATEMENTS} instructions", number)
        if len(line) > LONGEST_STATEMENT:
            raise source.refuse(f"an instruction has at most {LONGEST_STATEMENT} characters", number)
        command, *words = _words(source, line, number, escapes=escapes)
        if command.quoted or command.name is not None:
            raise refuse_word(source, number, command, "an instruction begins with a command, such as model or merge")
        positional = tuple(word for word in words if word.name is None)
        yield Instruction(
            command, positional, tuple(word for word in words if word.name is not None), number, tuple(comments)
        )
        comments.clear()


def refuse_word(source: SourceText, line: int, word: Word, message: str, hint: str | None = None) -> RecipeSyntaxError:
    """An error at a word."""
    return source.refuse(message, line, word.column, word.width, hint)


def _words(source: SourceText, line: str, number: int, *, escapes: bool) -> Iterator[Word]:
    place = 0
    while True:
        while place < len(line) and line[place] in " \t":
            place += 1
        if place == len(line):
            return
        found = _WORD[escapes].match(line, place)
        assert found is not None
        bare, text = found["bare"], found["text"]
        if bare.startswith("#"):
            raise source.refuse("a comment stands on a line of its own", number, place + 1)
        column, width = place + 1, found.end() - place
        if found.end() == place:  # some other blank, such as a form feed
            raise source.refuse("words stand apart by spaces and tabs", number, column)
        if found["quote"] is not None and found["end"] is None:
            raise source.refuse("this text has no end", number, found.start("quote") + 1, hint='add a " after it')
        if max(len(bare), len(text or "")) > LONGEST_TEXT:
            raise source.refuse(f"a text in a recipe has at most {LONGEST_TEXT} characters", number, column)
        name, equals, value = bare.partition("=")
        if text is not None and (value or (bare and not equals)):
            raise source.refuse(
                "a text in quotes stands by itself, or right after a name and an equals sign", number, column, width
            )
        if equals and not name:
            raise source.refuse("an equals sign stands after a name", number, column, width)
        if not equals:
            name, value = "", bare
        content = value if text is None else text
        if escapes:
            if (len(bare) - len(bare.rstrip("\\"))) % 2:
                raise source.refuse("a backslash stands before the character that it escapes", number, column, width)
            content, name = _ESCAPE.sub(r"\1", content), _ESCAPE.sub(r"\1", name)
        yield Word(content, text is not None, column, width, name if equals else None)
        place = found.end()
