"""How a file spells the keys of a known arch, and what becomes of them in another spelling.

A spelling is a dialect (``original``, or another layout that the arch file names), and whether the file holds one
component alone, without what tells it from others. Everything is converted by way of the original dialect.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from remelt.archs.arch import Arch, Component, ComponentDialect, Globs
from remelt.archs.key_map import KeyMap
from remelt.archs.maps import key_map
from remelt.core.pieces import Converted, Piece
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError

ORIGINAL = "original"
_BESIDE = ("safety_checker/", "image_encoder/")
"""Folders of a pipeline that are no part of the model."""


@dataclass(frozen=True)
class Spelling:
    """A dialect, and the component that a file holds ``alone``; empty where keys say which component they are of."""

    dialect: str = ORIGINAL
    alone: str = ""

    def __str__(self) -> str:
        return f"{self.dialect}, {self.alone} alone" if self.alone else self.dialect


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


def spelling_alone(arch: Arch, tensors: Mapping[str, TensorInfo], known: Collection[str]) -> Spelling | None:
    """How a file that holds one component alone spells its keys, told by the original keys of a whole model.

    None where at least half of its keys are not those of one component.
    """
    best, spelling = len(tensors) / 2, None
    for component in arch.components:
        for dialect in (ORIGINAL, *(one.dialect for one in component.dialects)):
            one = Spelling(dialect, component.name)
            count = sum(original_key(arch, one, key) in known for key in tensors)
            if count > best:
                best, spelling = count, one
    return spelling


def original_key(arch: Arch, spelling: Spelling, key: str) -> str:
    """The original name of a key, or of what it is a part of; the key itself where no rule knows it."""
    if spelling.dialect == ORIGINAL:
        alone = next((one for one in arch.components if one.name == spelling.alone), None)
        return arch.canonical(key) if alone is None or key.startswith(alone.prefixes) else alone.prefixes[0] + key
    for component, _, known, start in _parts(arch, spelling):
        found = known.original(key[len(start) :]) if _is_inside(key, start) else None
        if found is not None:
            return component.prefixes[0] + found
    return key


def usual_key(arch: Arch, spelling: Spelling, key: str) -> str:
    """The name that is written for a key, of those that are read for it; the key itself where no rule knows it."""
    if spelling.dialect == ORIGINAL:
        return arch.usual(key)
    for _, _, known, start in _parts(arch, spelling):
        found = known.usual(key[len(start) :]) if _is_inside(key, start) else None
        if found is not None:
            return start + found
    return key


def to_original(arch: Arch, spelling: Spelling, tensors: Mapping[str, TensorInfo]) -> Conversion:
    """The tensors of a file in the original dialect; `FormatError` where parts of one are missing or do not fit."""
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
    result.left_out += [key for key in others if key.startswith(_BESIDE)]
    result.unknown += [key for key in others if not key.startswith(_BESIDE)]
    return result


def from_original(arch: Arch, spelling: Spelling, tensors: Mapping[str, TensorInfo]) -> Conversion:
    """The tensors of the original dialect in another spelling; `FormatError` where one cannot be divided."""
    given = {arch.usual(key): key for key in tensors}
    if len(given) < len(tensors):
        first = next(key for key in tensors if given[arch.usual(key)] != key)
        raise FormatError(f"{first} and {given[arch.usual(first)]} are two names for one tensor")
    found = _from_usual(arch, spelling, {name: tensors[key] for name, key in given.items()})
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
        if spelling.alone:  # a file of one component has no names for the others
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
    strange = [] if spelling.alone else [key for key in keys if not key.startswith(own)]
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
            return dialect, found
    return None


def is_left_out(arch: Arch, dialect: str, key: str) -> bool:
    """Whether a dialect has no place for an original key."""
    for component in arch.components:
        for prefix in component.prefixes:
            if key.startswith(prefix):
                parts = [one for one in component.dialects if one.dialect == dialect]
                if not parts:
                    return arch.is_copied(key) or _is_shadow(arch, key)
                return any(Globs.of(one.left_out).match(key[len(prefix) :]) for one in parts)
    return arch.is_copied(key)


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
