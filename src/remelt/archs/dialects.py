"""How a file spells the keys of a known arch, and what becomes of them in another spelling.

A spelling is a dialect (``original``, or another layout that the arch file names), and whether the file holds one
component alone, without what tells it from others. Everything is converted by way of the original dialect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from remelt.archs.arch import Arch, Component, ComponentDialect, Globs
from remelt.archs.key_map import KeyMap
from remelt.archs.maps import key_map
from remelt.core.pieces import Converted, Piece
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError

ORIGINAL = "original"
_MOST_STARTS = 8
"""Names before all keys that are looked at: a file below more of them is none that a trainer writes."""
_BESIDE = ("safety_checker/", "image_encoder/")
"""Folders of a pipeline that are no part of the model."""


@dataclass(frozen=True)
class Spelling:
    """A dialect, and the component that a file holds ``alone``; empty where keys say which component they are of.

    ``start`` is what the file has before all of its keys, such as ``module.``; a few may be without it.
    ``below`` are the names between a component and the model inside it that a file of that model alone lacks.
    """

    dialect: str = ORIGINAL
    alone: str = ""
    start: str = ""
    below: str = ""

    def __str__(self) -> str:
        return f"{self.dialect}, {self.alone} alone" if self.alone else self.dialect

    @property
    def inner(self) -> Spelling:
        """The same, of keys without what stands before them."""
        return replace(self, start="") if self.start else self

    def within(self, key: str) -> str:
        """A key of the file without what stands before it."""
        return key.removeprefix(self.start)


IN_FULL = Spelling()
"""The original dialect, of a whole checkpoint."""


@dataclass
class Conversion:
    """Tensors in another spelling; the keys for which it has no place, and those that are of no known part."""

    tensors: dict[str, Converted] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def dialects_of(arch: Arch) -> tuple[str, ...]:
    """The layouts that an arch is known in, the original first."""
    others = dict.fromkeys(one.dialect for component in arch.components for one in component.dialects)
    return (ORIGINAL, *others)


def is_of_folders(arch: Arch, dialect: str) -> bool:
    """Whether a model in that layout is a folder of components, and no single file."""
    return any(one.folder for part in arch.components for one in part.dialects if one.dialect == dialect)


def spellings_of(arch: Arch) -> Iterator[Spelling]:
    """Every way in which a file of an arch may spell its keys, the original dialect first."""
    for dialect in dialects_of(arch):
        yield Spelling(dialect)
        for component in arch.components:
            folders = [one.folder for one in component.dialects if one.dialect == dialect]
            if component.bare and (dialect == ORIGINAL or any(folders)):  # a prefix of keys stays on a part alone
                yield Spelling(dialect, component.name)


def find_spelled(arch: Arch, spelling: Spelling, tensors: Mapping[str, TensorInfo], key: str) -> TensorInfo | None:
    """The tensor of an original key, with the type and shape that it would have there; None where it is not there."""
    if spelling == IN_FULL:
        return tensors.get(key) or next((tensors[name] for name in arch.others(key) if name in tensors), None)
    for component, rest in _places(arch, key):
        if spelling.alone not in ("", component.name):
            continue
        if spelling.dialect == ORIGINAL:
            return tensors.get(rest) if rest.startswith(component.bare) else None
        for part in component.dialects:
            if part.dialect == spelling.dialect:
                return _spelled(part, _start(part, spelling), tensors, rest)
    return None


def _spelled(part: ComponentDialect, start: str, tensors: Mapping[str, TensorInfo], rest: str) -> TensorInfo | None:
    known = key_map(part.key_map, part.below)
    present: dict[str, TensorInfo] = {}
    for names in known.spellings(rest):
        name = next((name for name in names if start + name in tensors), None)
        if name is None:
            return None
        present[name] = tensors[start + name]
    if not present:
        return None
    try:
        made = known.to_original(present)[0].get(rest)
    except FormatError:  # its parts do not fit
        return None
    return None if made is None else made.info


def spelling_of_part(
    arch: Arch, keys: Collection[str], known: Collection[str], starts: Collection[str] = ("",)
) -> tuple[Spelling, int] | None:
    """How a file that holds a part of a model spells its keys, told by the original keys of a whole one, ``known``.

    And how many of its keys that model has. ``starts`` may stand before them. None where at least half of its keys are
    not those of one component, or spelled as a whole model spells them.
    """
    best, spelling = len(keys) // 2, None
    for one in _spellings_of_parts(arch, known, starts):
        count = len({name for key in keys if (name := original_key(arch, one, key)) in known})
        if count > best:
            best, spelling = count, one
        if best == len(keys):
            break
    return None if spelling is None else (spelling, best)


def _spellings_of_parts(arch: Arch, known: Collection[str], starts: Collection[str]) -> Iterator[Spelling]:
    for start in starts:
        yield Spelling(start=start)
    for component in arch.components:
        inside = [key[len(prefix) :] for prefix in component.prefixes for key in known if key.startswith(prefix)]
        belows = dict.fromkeys(("", *starts_of(inside)))
        for start in starts:
            yield from (Spelling(ORIGINAL, component.name, start, below) for below in belows)
            yield from (Spelling(one.dialect, component.name, start) for one in component.dialects)


def holds(component: Component, keys: Collection[str]) -> bool:
    """Whether keys are those of a component of a whole model, most of which its other layouts know."""
    prefix = next((one for one in component.prefixes if all(key.startswith(one) for key in keys)), None)
    if prefix is None:
        return False
    maps = [key_map(part.key_map, part.below) for part in component.dialects]
    known = sum(any(one.of_original(key[len(prefix) :]) is not None for one in maps) for key in keys)
    return 2 * known > len(keys)


def starts_of(keys: Collection[str], beside: int = 0) -> Iterator[str]:
    """What all keys begin with, up to each of their first dots, the shortest first; ``beside`` may lack it.

    >>> list(starts_of(["module.net.a", "module.net.b.c"]))
    ['module.', 'module.net.']
    """
    inside, start = list(keys), ""
    for _ in range(_MOST_STARTS):
        ends = Counter(key[: key.find(".", len(start)) + 1] for key in inside)
        ((found, count),) = ends.most_common(1) or [("", 0)]
        if len(found) <= len(start) or count < max(len(keys) - beside, 1):
            return
        yield found
        inside, start = [key for key in inside if key.startswith(found)], found


def original_key(arch: Arch, spelling: Spelling, key: str) -> str:
    """The original name of a key, or of what it is a part of; the key itself where no rule knows it."""
    key = spelling.within(key)
    if spelling.dialect == ORIGINAL:
        alone = next((one for one in arch.components if one.name == spelling.alone), None)
        if alone is None or key.startswith(alone.prefixes):
            return arch.canonical(key)
        return arch.usual(alone.prefixes[0] + spelling.below + key)
    for component, _, known, start in _parts(arch, spelling):
        found = known.original(key[len(start) :]) if _is_inside(key, start) else None
        if found is not None:
            return component.prefixes[0] + found
    return key


def usual_key(arch: Arch, spelling: Spelling, key: str) -> str:
    """The name that is written for a key, of those that are read for it; the key itself where no rule knows it."""
    if spelling.start:
        inner = usual_key(arch, spelling.inner, spelling.within(key))
        return spelling.start + inner if key.startswith(spelling.start) else key
    if spelling.dialect == ORIGINAL:
        return arch.usual(key)
    for _, _, known, start in _parts(arch, spelling):
        found = known.usual(key[len(start) :]) if _is_inside(key, start) else None
        if found is not None:
            return start + found
    return key


def to_original(arch: Arch, spelling: Spelling, tensors: Mapping[str, TensorInfo]) -> Conversion:
    """The tensors of a file in the original dialect; `FormatError` where parts of one are missing or do not fit."""
    if spelling.start:
        given = {spelling.within(key): key for key in tensors}
        _refuse_two_names(given, tensors, spelling.within)
        inside = {name: tensors[key] for name, key in given.items()}
        return _given(to_original(arch, spelling.inner, inside), given)
    result = Conversion()
    if spelling.dialect == ORIGINAL:
        result.tensors = {original_key(arch, spelling, key): _as_it_is(key, info) for key, info in tensors.items()}
        return result
    for component, _, known, start in _parts(arch, spelling):
        inside = {key[len(start) :]: info for key, info in tensors.items() if _is_inside(key, start)}
        made, unknown = known.to_original(inside)
        for name, converted in made.items():
            result.tensors[component.prefixes[0] + name] = _from(converted, start)
        result.unknown += [start + key for key in unknown]
    known_starts = tuple(start for _, _, _, start in _parts(arch, spelling))
    others = [key for key in tensors if not any(_is_inside(key, start) for start in known_starts)]
    result.tensors |= {key: _as_it_is(key, tensors[key]) for key in others if _stays(arch, spelling.dialect, key)}
    others = [key for key in others if key not in result.tensors]
    beside = [key for key in others if key.startswith(_BESIDE) or _has_no_place(arch, spelling, key)]
    result.left_out += beside
    result.unknown += [key for key in others if key not in beside]
    return result


def _has_no_place(arch: Arch, spelling: Spelling, key: str) -> bool:
    """Whether a key stands beside a component alone, that has no place in its layout: a logit scale, as a rule."""
    parts = _parts(arch, spelling) if spelling.alone else ()
    return any(Globs.of(part.left_out).match(key.rpartition(".")[2]) for _, part, _, _ in parts)


def from_original(arch: Arch, spelling: Spelling, tensors: Mapping[str, TensorInfo]) -> Conversion:
    """The tensors of the original dialect in another spelling; `FormatError` where one cannot be divided."""
    given = {arch.usual(key): key for key in tensors}
    _refuse_two_names(given, tensors, arch.usual)
    found = _given(_from_usual(arch, spelling.inner, {name: tensors[key] for name, key in given.items()}), given)
    found.tensors = {spelling.start + name: converted for name, converted in found.tensors.items()}
    return found


def _refuse_two_names(given: Mapping[str, str], keys: Iterable[str], named: Callable[[str], str]) -> None:
    first = next((key for key in keys if given[named(key)] != key), None)
    if first is not None:
        raise FormatError(f"{first} and {given[named(first)]} are two names for one tensor")


def _given(found: Conversion, given: Mapping[str, str]) -> Conversion:
    """The same, of keys with the names that the file has for them."""
    return Conversion(
        {name: _of_given(converted, given) for name, converted in found.tensors.items()},
        [given[key] for key in found.left_out],
        [given[key] for key in found.unknown],
    )


def _from_usual(arch: Arch, spelling: Spelling, tensors: Mapping[str, TensorInfo]) -> Conversion:
    """The same, of keys with their usual names."""
    result = Conversion()
    if spelling.dialect == ORIGINAL:
        for key, info in tensors.items():
            result.tensors[_shortened(arch, spelling, key)] = _as_it_is(key, info)
        return result
    taken: set[str] = set()
    for component, part, known, start in _parts(arch, spelling):
        for prefix in component.prefixes:
            inside = {
                key[len(prefix) :]: info
                for key, info in tensors.items()
                if key not in taken and key.startswith(prefix) and prefix.endswith(".")
            }
            taken.update(prefix + key for key in inside)
            left_out = Globs.of(part.left_out)
            result.left_out += [prefix + key for key in inside if left_out.match(key)]
            made, unknown = known.to_other({key: info for key, info in inside.items() if not left_out.match(key)})
            for name, converted in made.items():
                if start + name in result.tensors:
                    first = result.tensors[start + name].pieces[0].key
                    raise FormatError(f"{first} and {prefix}{converted.pieces[0].key} are two names for one tensor")
                result.tensors[start + name] = _from(converted, prefix)
            result.unknown += [prefix + key for key in unknown]
    for key, info in tensors.items():
        if key in taken:
            continue
        # A file of one component has no names for the others.
        if spelling.alone or _stays(arch, spelling.dialect, key):
            result.tensors[key] = _as_it_is(key, info)
            continue
        (result.left_out if arch.is_copied(key) or _is_shadow(arch, key) else result.unknown).append(key)
    return result


def keys_of_another_layout(arch: Arch, spelling: Spelling, keys: Collection[str]) -> tuple[str, list[str]] | None:
    """A layout beside a file's own that some of its keys are of, and those; None where there is none."""
    originals = tuple(one for component in arch.components for one in component.prefixes if one.endswith("."))
    own = originals
    if spelling.dialect != ORIGINAL:
        own = tuple(start for _, _, _, start in _parts(arch, spelling) if start)
    given = {} if spelling.alone else {spelling.within(key): key for key in keys}
    strange = [key for key in given if not key.startswith(own)]
    for dialect in dialects_of(arch) if strange else ():
        if dialect == ORIGINAL:
            found = [key for key in strange if key.startswith(originals)]
        else:
            parts = [(known, start) for _, _, known, start in _parts(arch, Spelling(dialect)) if start]
            found = [
                key
                for key in strange
                if any(_is_inside(key, start) and known.original(key[len(start) :]) for known, start in parts)
            ]
        if found and dialect != spelling.dialect:
            return dialect, [given[key] for key in found]
    return None


def is_left_out(arch: Arch, dialect: str, key: str) -> bool:
    """Whether a dialect has no place for an original key."""
    for component in arch.components:
        for prefix in component.prefixes:
            if key.startswith(prefix):
                parts = [one for one in component.dialects if one.dialect == dialect]
                if not parts:
                    return (arch.is_copied(key) or _is_shadow(arch, key)) and not _stays(arch, dialect, key)
                return any(Globs.of(one.left_out).match(key[len(prefix) :]) for one in parts)
    return arch.is_copied(key) and not _stays(arch, dialect, key)


def _stays(arch: Arch, dialect: str, key: str) -> bool:
    """Whether a key has the same name in a layout of single files: markers such as ``v_pred``, and schedules."""
    if not arch.is_copied(key) or _is_shadow(arch, key) or is_of_folders(arch, dialect):
        return False
    found = arch.component_of(key)
    return found is None or not found[0].dialects


def _is_shadow(arch: Arch, key: str) -> bool:
    return arch.shadow is not None and key.startswith(arch.shadow.prefix)


def _shortened(arch: Arch, spelling: Spelling, key: str) -> str:
    for component in arch.components:
        if component.name == spelling.alone:
            return key.removeprefix(component.prefixes[0])
    return key


def _places(arch: Arch, key: str) -> Iterator[tuple[Component, str]]:
    """The components that an original key may be of, with the rest of the key after the prefix."""
    for component in arch.components:
        for prefix in component.prefixes:
            if key.startswith(prefix):
                yield component, key[len(prefix) :]


def _parts(arch: Arch, spelling: Spelling) -> Iterator[tuple[Component, ComponentDialect, KeyMap, str]]:
    """The components of a dialect, each with its key map and what its keys begin with there."""
    for component in arch.components:
        for part in component.dialects:
            if part.dialect == spelling.dialect and spelling.alone in ("", component.name):
                yield component, part, key_map(part.key_map, part.below), _start(part, spelling)


def _start(part: ComponentDialect, spelling: Spelling) -> str:
    """What the keys of a component begin with: a prefix stays where a file holds the component alone."""
    return part.prefix or ("" if spelling.alone else f"{part.folder}/")


def _is_inside(key: str, start: str) -> bool:
    return key.startswith(start) and "/" not in key[len(start) :]


def _as_it_is(key: str, info: TensorInfo) -> Converted:
    return Converted(info, (Piece(key, 0, info.shape[0] if info.shape else 1),))


def _of_given(converted: Converted, given: Mapping[str, str]) -> Converted:
    """The same, of keys with the names that the file has for them."""
    pieces = tuple(Piece(given[piece.key], piece.start, piece.stop) for piece in converted.pieces)
    return Converted(converted.info, pieces, converted.transposed)


def _from(converted: Converted, start: str) -> Converted:
    """The same, of keys with what they begin with."""
    pieces = tuple(Piece(start + piece.key, piece.start, piece.stop) for piece in converted.pieces)
    return Converted(converted.info, pieces, converted.transposed)
