"""What the words of an instruction stand for: values, texts, and the results of instructions before."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from remelt.core.nearest import nearest_hint
from remelt.errors import RecipeSyntaxError, Span
from remelt.recipe.blocks import BlockWeights
from remelt.recipe.node import Literal, Node, Value
from remelt.text.eras.blocks import BlockNumbers
from remelt.text.eras.instructions import Instruction, Word, refuse_word
from remelt.text.eras.methods import OldMethod
from remelt.text.eras.weights import block_weights
from remelt.text.source import MOST_DIGITS, SourceText

_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Named:
    """What a ``dict`` instruction made: names with values, and where the names stand."""

    items: Mapping[str, Literal]
    words: Mapping[str, Word]
    line: int


Result = Node | Named | BlockNumbers


@dataclass(frozen=True)
class Era:
    """How the recipes of a time were written: whether backslashes escape, the word for a call, the words for
    constants, and the methods."""

    title: str
    escapes: bool
    call: str
    constants: Mapping[str, Literal]
    methods: Mapping[str, OldMethod]
    commands: tuple[str, ...]
    weights: Callable[[Mapping[str, float]], BlockWeights | float] = block_weights


@dataclass
class Words:
    """The results so far, and what the words of the next instruction mean by them."""

    source: SourceText
    era: Era
    results: list[Result] = field(default_factory=list)
    line: int = 1

    def refuse(self, word: Word, message: str, hint: str | None = None) -> RecipeSyntaxError:
        """An error at a word of this line, to be raised."""
        return refuse_word(self.source, self.line, word, message, hint)

    def span_of(self, instruction: Instruction) -> Span:
        """Where an instruction stands, from its command to its last word."""
        words = (instruction.command, *instruction.words, *instruction.named)
        end = max(word.column + word.width for word in words)
        return self.source.span(self.line, instruction.command.column, end - instruction.command.column)

    def value(self, word: Word) -> Result:
        """What a word stands for: an earlier result, a text, a number, or a constant."""
        if word.quoted:
            return Value(word.text, span=self.source.span(self.line, word.column, word.width))
        if word.text.startswith("&"):
            return self.reference(word)
        return Value(self.plain(word), span=self.source.span(self.line, word.column, word.width))

    def plain(self, word: Word) -> Literal:
        """A word's number, text or constant."""
        text = word.text
        if word.quoted:
            return text
        if text in self.era.constants:
            return self.era.constants[text]
        if _WHOLE.fullmatch(text) and len(text) <= MOST_DIGITS:
            return int(text)
        if _DECIMAL.fullmatch(text) and math.isfinite(number := float(text)):
            return number
        if text.startswith("'"):
            raise self.refuse(word, "a text stands in double quotes", f'as in "{text.strip(chr(39))[:40]}"')
        hint = "a number, a text in quotes, or the number of a result as &0"
        raise self.refuse(word, f"{text[:40]!r} is no value", hint)

    def reference(self, word: Word) -> Result:
        """An earlier result by its number."""
        number = word.text[1:]
        if not number.isascii() or not number.isdigit() or len(number) > 9:
            raise self.refuse(
                word, f"{word.text[:40]!r} is no number of a result", "results are counted from 0, as in &0"
            )
        if int(number) >= len(self.results):
            have = f"there are {len(self.results)} before it" if self.results else "there is none before it"
            raise self.refuse(word, f"{word.text} is no earlier result: {have}", "results are counted from 0")
        return self.results[int(number)]

    def text(self, instruction: Instruction, place: int, names: tuple[str, ...], what: str) -> str | None:
        """An argument that is a text, by its place or by one of its names; None where it is left out or null."""
        found = self._words(instruction, place, names)
        if not found:
            return None
        if len(found) > 1:
            raise self.refuse(found[1], f"{what} is given twice")
        value = self.plain(found[0])
        if value is not None and not isinstance(value, str):
            raise self.refuse(found[0], f"{what} is a text in quotes")
        return value

    def word(self, instruction: Instruction, place: int, names: tuple[str, ...]) -> Word:
        """The word of an argument that is given."""
        return self._words(instruction, place, names)[0]

    def _words(self, instruction: Instruction, place: int, names: tuple[str, ...]) -> list[Word]:
        named = [word for word in instruction.named if word.name in names]
        return [*instruction.words[place : place + 1], *named]

    def only(self, instruction: Instruction, most: int, names: tuple[str, ...]) -> None:
        """Refuse what an instruction does not take."""
        command = instruction.command.text
        if len(instruction.words) > most:
            raise self.refuse(instruction.words[most], f"{command} takes at most {most} of such words")
        for word in instruction.named:
            if word.name not in names:
                raise self.refuse(word, f"{command} has no {word.name!r}", nearest_hint(str(word.name), names))
