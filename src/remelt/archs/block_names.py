"""What a key's block may be called: by its arch, by its component, by the shortest tail of its path, and in full."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from remelt.archs.arch import Arch, Component
from remelt.archs.structure import Place, Structure


@dataclass(frozen=True, slots=True)
class Tails:
    """The ways to write a path: the shortest tail that is its own, and the shorter ones that others share."""

    short: str
    shared: tuple[str, ...]


class BlockNames:
    """The names of every block of a structure; what is the same for many keys is found once.

    >>> from remelt.archs.structure import infer
    >>> structure = infer(["a.norm.weight", "a.layers.0.mlp.weight", "a.layers.1.mlp.weight"])
    >>> names = BlockNames(structure, None)
    >>> [names.of(key, key, place) for key, place in structure.places.items()][:2]
    [('norm', 'a.norm'), ('layers.0', 'a.layers.0')]
    """

    def __init__(self, structure: Structure, arch: Arch | None) -> None:
        self._arch = arch
        self._stacks = shorten(structure.stacks)
        outside = {key: place for key, place in structure.places.items() if place.stack is None}
        self._modules = shorten(dict.fromkeys(place.module for place in outside.values()))
        held: dict[str, dict[str, None]] = {}
        for key, place in outside.items():
            component, path = self._within(key, place)
            if component is not None:
                held.setdefault(component.name, {})[path] = None
        self._parts = {component: shorten(paths) for component, paths in held.items()}

    def of(self, key: str, canonical: str, place: Place) -> tuple[str, ...]:
        """The names of a key's block, the one to show first; ``key`` is how the file spells it."""
        names = self._declared(canonical)
        if place.stack is not None:
            full = f"{place.stack}.{place.number}"
            names = (*names, f"{self._stacks[place.stack].short}.{place.number}")
        elif names:
            return names
        else:
            full, names = place.module, tuple(self._of_module(canonical, place))
        # A file of one component alone spells the path without the component's prefix.
        prefix = canonical.removesuffix(key) if canonical.endswith(key) else ""
        return tuple(dict.fromkeys([*names, full, full.removeprefix(prefix) or full]))

    def shared(self, canonical: str, place: Place) -> Iterator[str]:
        """The short names that another block would answer to as well."""
        if place.stack is not None:
            yield from (f"{tail}.{place.number}" for tail in self._stacks[place.stack].shared)
            return
        if self._declared(canonical):
            return
        component, path = self._within(canonical, place)
        if component is None:
            yield from self._modules[place.module].shared
        else:
            yield from (_joined(component, tail) for tail in self._parts[component.name][path].shared)

    def _declared(self, canonical: str) -> tuple[str, ...]:
        return () if self._arch is None else self._arch.block_of(canonical)

    def _of_module(self, canonical: str, place: Place) -> Iterator[str]:
        component, path = self._within(canonical, place)
        if component is None:
            yield self._modules[place.module].short
        elif path:
            if component.bare:
                yield path
            yield _joined(component, self._parts[component.name][path].short)
        else:
            yield from (component.name, *component.aliases)

    def _within(self, canonical: str, place: Place) -> tuple[Component | None, str]:
        """The component of a key outside any stack, and the path of its module there: empty where that is all of it."""
        found = None if self._arch is None else self._arch.component_of(canonical)
        if found is None:
            return None, place.module
        component, rest = found
        prefix = canonical.removesuffix(rest)
        if place.module.startswith(prefix):
            return component, place.module[len(prefix) :]
        is_whole = f"{place.module}." == prefix and not component.bare
        return component, "" if is_whole else rest.partition(".")[0]


def _joined(component: Component, path: str) -> str:
    """A path of a component as its blocks are called: that of a component which files hold alone stands for itself."""
    return path if component.bare else f"{component.name}.{path}"


def shorten(paths: Iterable[str]) -> Mapping[str, Tails]:
    """For each path, how it may be shortened at a segment's boundary.

    >>> shorten(["encoder.mid", "decoder.mid", "decoder.norm_out"])["decoder.mid"]
    Tails(short='decoder.mid', shared=('mid',))
    """
    known = dict.fromkeys(paths)
    users: dict[str, int] = {}
    for path in known:
        for tail in _tails_of(path):
            users[tail] = users.get(tail, 0) + 1
    found = {}
    for path in known:
        shared: list[str] = []
        for tail in _tails_of(path):
            if users[tail] == 1 or tail == path:
                found[path] = Tails(tail, tuple(shared))
                break
            # A path written in full means just that one, even where others end in the same words.
            if tail not in known:
                shared.append(tail)
    return found


def _tails_of(path: str) -> Iterator[str]:
    """The tails of a path at a segment's boundary, shortest first, at most 16, but no number; then the whole path."""
    cuts = [match.end() for match in re.finditer(r"[./]", path)]
    for cut in reversed(cuts[-16:]):
        if not path[cut:].isdecimal():
            yield path[cut:]
    yield path
