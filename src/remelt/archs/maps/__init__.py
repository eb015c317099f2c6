"""Key maps of parts of models, one TOML file each: ``[rules]``, with ``[inner]`` names and ``[ranges]`` of numbers."""

from __future__ import annotations

import functools
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
