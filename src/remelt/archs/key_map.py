"""Key maps: how the names of one layout of a model become those of another, by templates instead of tables.

A rule pairs the name of a module (or of a tensor) in the original layout with its name, or the names of its parts, in
the other one. All that a rule may do to a tensor is to take rows of it, or put those of several one after another; to
leave out or add the dimensions of a 1x1 kernel; or to transpose it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from remelt.core.pieces import Converted, Piece
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError, OptionError

_WHOLE_NUMBER = re.compile(r"(?<![A-Za-z_0-9])(?:0|[1-9][0-9]{0,8})(?![A-Za-z_0-9])")
_PLACE = re.compile(rf"\{{([a-z])\}}|{_WHOLE_NUMBER.pattern}")
_FIELD = re.compile(r"\{([^{}]*)\}")
_TERM = re.compile(r"([+-]?)(?:(?:(\d+)\*)?([a-z])|(\d+))")
_KERNELS = {"kernel": (1, 1), "volume": (1, 1, 1)}
_OPERATIONS = ("", *_KERNELS, "halves", "final", "transposed")


@dataclass(frozen=True)
class Rule:
    """A module or tensor of the original layout, and what it is in the other one.

    ``parts`` has several names where its rows are divided, each with the names that are read for it beside the first,
    which is written. ``shares`` tells of each part how many rows it has: ``c`` as many as the weight has columns, ``=``
    an equal share of the rest. ``operation`` is ``kernel`` where a linear map is a 1x1 convolution in the original,
    ``volume`` where it is one of 1x1x1, ``halves`` where its two halves are exchanged, ``final`` where they are if
    there are but two (as many rows as twice its columns), ``transposed`` where rows are columns. Names may hold numbers
    as ``{i}``; what ends in a dot is a module.
    """

    original: str
    parts: tuple[tuple[str, ...], ...]
    shares: tuple[str, ...] = ()
    operation: str = ""


class Found(NamedTuple):
    """A key under a rule: which, which part of it, its numbers by name, and what follows the rule's name."""

    rule: Rule
    part: int
    numbers: Mapping[str, int]
    rest: str


class KeyMap:
    """The rules of one part of a model, both ways.

    >>> rules = KeyMap([Rule("blocks.{i}.qkv.", (("blocks.{i}.to_q.",), ("blocks.{i}.to_k.",), ("blocks.{i}.to_v.",)))])
    >>> rules.names("blocks.7.qkv.weight")
    ('blocks.7.to_q.weight', 'blocks.7.to_k.weight', 'blocks.7.to_v.weight')
    >>> rules.original("blocks.7.to_k.bias")
    'blocks.7.qkv.bias'
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self._originals: dict[str, list[tuple[tuple[int | str, ...], Rule, int]]] = {}
        self._others: dict[str, list[tuple[tuple[int | str, ...], Rule, int]]] = {}
        for rule in self.rules:
            _enter(self._originals, rule.original, rule, 0)
            for place, names in enumerate(rule.parts):
                for name in names:
                    _enter(self._others, name, rule, place)

    def of_original(self, key: str) -> Found | None:
        """The rule of a key of the original layout."""
        return _find(self._originals, key)

    def of_other(self, key: str) -> Found | None:
        """The rule of a key of the other layout."""
        return _find(self._others, key)

    def original(self, key: str) -> str | None:
        """The name in the original layout of a key of the other one, whole or in part; None where no rule knows it."""
        found = self.of_other(key)
        return None if found is None else _named(found.rule.original, found)

    def usual(self, key: str) -> str | None:
        """The name that is written for a key of the other layout; None where no rule knows it."""
        found = self.of_other(key)
        return None if found is None else _named(found.rule.parts[found.part][0], found)

    def names(self, key: str) -> tuple[str, ...]:
        """The names in the other layout of a key of the original one; none where no rule knows it."""
        found = self.of_original(key)
        return () if found is None else tuple(_named(names[0], found) for names in found.rule.parts)

    def spellings(self, key: str) -> tuple[tuple[str, ...], ...]:
        """The same, with all the names that are read for each part."""
        found = self.of_original(key)
        if found is None:
            return ()
        return tuple(tuple(_named(name, found) for name in names) for names in found.rule.parts)

    def to_other(self, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, Converted], list[str]]:
        """The tensors in the other layout, and the keys that no rule knows.

        Raises `FormatError` where rows cannot be divided as a rule says.
        """
        made: dict[str, Converted] = {}
        unknown = []
        for key, info in tensors.items():
            found = self.of_original(key)
            if found is None:
                unknown.append(key)
                continue
            names = [_named(names[0], found) for names in found.rule.parts]
            _refuse_second(names[0], made, key)
            if len(names) == 1:
                made[names[0]] = _changed(key, info, found.rule.operation, tensors, other=True)
                continue
            rows = _rows(found, key, info, tensors)
            start = 0
            for name, count in zip(names, rows, strict=True):
                part = replace(info, shape=(count, *info.shape[1:]))
                made[name] = Converted(part, (Piece(key, start, start + count),))
                start += count
        return made, unknown

    def to_original(self, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, Converted], list[str]]:
        """The tensors in the original layout, and the keys that no rule knows.

        Raises `FormatError` where a part is missing, or the parts do not fit together.
        """
        made: dict[str, Converted] = {}
        unknown = []
        joined: dict[str, dict[int, str]] = {}
        rules: dict[str, Found] = {}
        for key, info in tensors.items():
            found = self.of_other(key)
            if found is None:
                unknown.append(key)
                continue
            name = _named(found.rule.original, found)
            if len(found.rule.parts) == 1:
                _refuse_second(name, made, key)
                made[name] = _changed(key, info, found.rule.operation, tensors, other=False)
                continue
            made.setdefault(name, Converted(info, ()))  # where the first part stands
            other = joined.setdefault(name, {}).setdefault(found.part, key)
            if other != key:
                raise FormatError(f"{other} and {key} are two names for one tensor")
            rules[name] = found
        for name, parts in joined.items():
            made[name] = _joined(name, parts, rules[name], tensors)
        return made, unknown


def _enter(
    table: dict[str, list[tuple[tuple[int | str, ...], Rule, int]]], template: str, rule: Rule, place: int
) -> None:
    """File a rule under its template with all numbers masked; what each must be stands beside it."""
    numbers: list[int | str] = []

    def masked(found: re.Match[str]) -> str:
        numbers.append(found[1] if found[1] is not None else int(found[0]))
        return "#"

    name = _PLACE.sub(masked, template)
    table.setdefault(name, []).append((tuple(numbers), rule, place))


def _find(table: Mapping[str, list[tuple[tuple[int | str, ...], Rule, int]]], key: str) -> Found | None:
    """The rule with the longest name that a key begins with, at a dot, or is."""
    if "#" in key:
        return None
    numbers = [int(number) for number in _WHOLE_NUMBER.findall(key)]
    masked = _WHOLE_NUMBER.sub("#", key)
    end = len(masked)
    while end > 0:
        for wanted, rule, place in table.get(masked[:end], ()):
            fits = _fitting(wanted, numbers)
            if fits is not None:
                return Found(rule, place, fits, _after(key, masked[:end]))
        end = masked.rfind(".", 0, end - 1) + 1
    return None


def _fitting(wanted: Sequence[int | str], numbers: Sequence[int]) -> dict[str, int] | None:
    found: dict[str, int] = {}
    for want, number in zip(wanted, numbers, strict=False):
        if isinstance(want, int):
            if want != number:
                return None
        elif found.setdefault(want, number) != number:
            return None
    return found


def _after(key: str, masked: str) -> str:
    """What follows in a key after as many segments as a masked beginning has."""
    if not masked.endswith("."):
        return ""
    return ".".join(key.split(".")[masked.count(".") :])


def _named(template: str, found: Found) -> str:
    return _FIELD.sub(lambda field: str(found.numbers[field[1]]), template) + found.rest


def _refuse_second(name: str, made: Mapping[str, Converted], key: str) -> None:
    if name in made:
        raise FormatError(f"{made[name].pieces[0].key} and {key} are two names for one tensor")


def _changed(
    key: str, info: TensorInfo, operation: str, tensors: Mapping[str, TensorInfo], *, other: bool
) -> Converted:
    """One tensor as one tensor of the other layout (``other``), or of the original one."""
    shape, rows = info.shape, info.shape[0] if info.shape else 1
    pieces: tuple[Piece, ...] = (Piece(key, 0, rows),)
    transposed = False
    if operation in _KERNELS:  # a model may have it in the same form in both layouts
        ones = _KERNELS[operation]
        if info.shape[2:] == (ones if other else ()) and len(shape) > 1:
            shape = shape[:2] if other else (*shape, *ones)
    elif operation == "halves" or (operation == "final" and rows == 2 * _columns(key, info, tensors)):
        if rows % 2:
            raise FormatError(f"{key} is {list(shape)}, which has no two halves")
        pieces = (Piece(key, rows // 2, rows), Piece(key, 0, rows // 2))
    elif operation == "transposed" and len(shape) == 2:
        shape, transposed = shape[::-1], True
    return Converted(replace(info, shape=shape), pieces, transposed)


def _rows(found: Found, key: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> list[int]:
    """How many rows each part of a tensor has."""
    shares = found.rule.shares or ("=",) * len(found.rule.parts)
    rows = info.shape[0] if info.shape else 0
    columns = _columns(key, info, tensors)
    rest, equal = rows - columns * shares.count("c"), shares.count("=")
    if not info.shape or rest < 0 or (columns == 0 and "c" in shares) or (rest % equal if equal else rest):
        raise FormatError(
            f"{key} is {list(info.shape)}, which cannot be divided into {len(shares)} parts: {' '.join(shares)}"
        )
    return [columns if share == "c" else rest // equal for share in shares]


def _columns(key: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> int:
    """How many columns the weight of a module has, of which this is the weight or the bias; 0 where it has none."""
    weight = tensors.get(f"{key.rpartition('.')[0]}.weight", info)
    return weight.shape[1] if len(weight.shape) > 1 else 0


def _joined(name: str, parts: Mapping[int, str], found: Found, tensors: Mapping[str, TensorInfo]) -> Converted:
    """Parts, one after another, as one tensor of the original layout."""
    missing = [_named(names[0], found) for place, names in enumerate(found.rule.parts) if place not in parts]
    if missing:
        raise FormatError(
            f"{name} consists of {len(found.rule.parts)} tensors, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    infos = [tensors[parts[place]] for place in range(len(found.rule.parts))]
    first = infos[0]
    odd = next((place for place, info in enumerate(infos) if info.shape[1:] != first.shape[1:]), None)
    unlike = next((place for place, info in enumerate(infos) if info.dtype is not first.dtype), None)
    for place, what in ((odd, "of another width"), (unlike, "of another type")):
        if place is not None:
            raise FormatError(
                f"{name} cannot be put together: {parts[place]} is {infos[place]}, {what} than {parts[0]}"
            )
    rows = sum(info.shape[0] for info in infos if info.shape)
    shares = found.rule.shares or ("=",) * len(infos)
    columns = _columns(parts[0], first, tensors)
    equal = {info.shape[:1] for share, info in zip(shares, infos, strict=True) if share == "="}
    named = {info.shape[:1] for share, info in zip(shares, infos, strict=True) if share == "c"}
    if not first.shape or len(equal) > 1 or named - {(columns,)}:
        sizes = ", ".join(f"{parts[place]} {list(info.shape)}" for place, info in enumerate(infos))
        raise FormatError(f"{name} cannot be put together of {sizes}: it could not be divided so again")
    pieces = tuple(Piece(parts[place], 0, info.shape[0]) for place, info in enumerate(infos))
    return Converted(replace(first, shape=(rows, *first.shape[1:])), pieces)


def rules_of(
    where: str,
    pairs: Iterable[tuple[str, str | Sequence[str]]],
    inner: Mapping[str, Iterable[tuple[str, str | Sequence[str]]]],
    ranges: Mapping[str, Iterable[int]],
) -> Iterator[Rule]:
    """The rules that pairs of templates say, ``original = other``.

    ``<name>`` at the end of both stands for each pair of ``inner[name]``. A number in the names is ``{i}``, or a sum
    such as ``{3*b+l+1}`` or ``{3-b}`` of letters that have ``ranges``; then there is a rule for each choice of them.
    The other side is one template, with others that are read for it after ``|``; a list of them for parts, of which
    each may begin with ``c:`` (as many rows as the weight has columns); or one in ``kernel(...)``, ``halves(...)``,
    ``final(...)`` or ``transposed(...)``.
    """
    for original, other in pairs:
        name = re.search(r"<([a-z_]+)>$", original)
        if name is None:
            yield from _each(where, _rule(where, original, other), ranges)
            continue
        if not isinstance(other, str) or not other.endswith(name[0]) or name[1] not in inner:
            raise OptionError(f"{where}: {original!r} and {other!r} end in the same <name> of [inner]")
        for within, made in inner[name[1]]:
            rule = _rule(where, within, made)
            head, tail = original[: -len(name[0])], other[: -len(name[0])]
            parts = tuple(tuple(start + part for start in tail.split("|") for part in names) for names in rule.parts)
            yield from _each(where, replace(rule, original=head + rule.original, parts=parts), ranges)


def _rule(where: str, original: str, other: str | Sequence[str]) -> Rule:
    if isinstance(other, str):
        call = re.fullmatch(r"([a-z]+)\((.*)\)", other)
        operation, names = (call[1], call[2]) if call is not None else ("", other)
        if operation not in _OPERATIONS:
            raise OptionError(f"{where}: {operation} is none of {', '.join(_OPERATIONS[1:])}")
        return Rule(original, (tuple(names.split("|")),), (), operation)
    shares = tuple("c" if name.startswith("c:") else "=" for name in other)
    return Rule(original, tuple(tuple(name.removeprefix("c:").split("|")) for name in other), shares)


def _each(where: str, rule: Rule, ranges: Mapping[str, Iterable[int]]) -> Iterator[Rule]:
    """The rule for every choice of the letters with ranges."""
    names = [rule.original, *itertools.chain(*rule.parts)]
    sums = {field for name in names for field in _FIELD.findall(name)}
    for text in sums:
        known = all(term[3] in ranges for term in _TERM.finditer(text) if term[3])
        if re.fullmatch(rf"[a-z]|(?:{_TERM.pattern})+", text) is None or (len(text) > 1 and not known):
            raise OptionError(f"{where}: {{{text}}} is no sum of numbers and letters with ranges")
    letters = sorted({term[3] for text in sums for term in _TERM.finditer(text) if term[3] in ranges})
    if not letters:
        yield rule
        return
    for chosen in itertools.product(*(ranges[letter] for letter in letters)):
        values = dict(zip(letters, chosen, strict=True))
        put = functools.partial(_summed, values)
        yield replace(
            rule,
            original=_FIELD.sub(put, rule.original),
            parts=tuple(tuple(_FIELD.sub(put, name) for name in part) for part in rule.parts),
        )


def _summed(values: Mapping[str, int], field: re.Match[str]) -> str:
    """A sum of letters with ranges as its number; a letter without one as it is."""
    total = 0
    for sign, times, letter, number in _TERM.findall(field[1]):
        if letter and letter not in values:
            return field[0]
        size = int(times or 1) * values[letter] if letter else int(number)
        total += -size if sign == "-" else size
    return str(total)
