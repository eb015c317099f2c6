"""Key maps of parts of models, one TOML file each: ``[rules]``, with ``[inner]`` names and ``[ranges]`` of numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from remelt.archs.key_map import KeyMap, Rule, rules_of
from remelt.archs.reader import Table, read_table
from remelt.errors import OptionError

_FOLDER = Path(__file__).parent


@functools.cache
def key_map(name: str, below: str = "") -> KeyMap:
    """The key map of that name; `OptionError` where there is none, or its file is wrong.

    Of originals that begin with ``below``, it has what follows; it has no others.
    """
    rules = _rules(name)
    return KeyMap(
        replace(rule, original=rule.original[len(below) :]) for rule in rules if rule.original.startswith(below)
    )


def templates(name: str, below: str = "") -> Iterator[tuple[str, str]]:
    """What the rules of a key map say, as its files write them: original names, each with its name in the other layout.

    The parts of ``<name>`` come first, as ``<name>`` before what they are. ``below`` as in `key_map`.
    """
    table = read_table(_FOLDER / f"{name}.toml")
    inner = table.table("inner")
    for part in inner.names:
        yield from ((f"<{part}>{original}", f"<{part}>{_shown(other)}") for original, other in inner.pairs(part))
    for original, other in table.pairs("rules"):
        if original.startswith(below):
            yield original[len(below) :], _shown(other)
    for included in table.texts("include"):
        yield from templates(included, below)


def _shown(other: str | tuple[str, ...]) -> str:
    return other if isinstance(other, str) else " + ".join(other)


def _rules(name: str) -> list[Rule]:
    """The rules of a file, and of those that it includes; its own come first."""
    path = _FOLDER / f"{name}.toml"
    if not path.is_file():
        raise OptionError(f"there is no key map named {name!r}")
    table = read_table(path)
    given = table.table("inner")
    inner = {entry: list(given.pairs(entry)) for entry in given.names}
    bounds = table.table("ranges")
    ranges = {letter: _range(bounds, letter) for letter in bounds.names}
    rules = list(rules_of(path.name, table.pairs("rules"), inner, ranges))
    for other in table.texts("include"):
        rules += _rules(other)
    table.refuse_unknown()
    return rules


def _range(table: Table, letter: str) -> range:
    """The numbers that ``0..3`` stands for."""
    first, dots, last = table.text(letter).partition("..")
    if not (dots and first.isdigit() and last.isdigit()):
        raise table.error(f"{letter!r} must be a range such as '0..3'")
    return range(int(first), int(last) + 1)
