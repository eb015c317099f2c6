"""The recipe inside its result: names that travel, never a path of the machine that made it."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from remelt.formats.locate import SUFFIXES
from remelt.recipe.method import Method
from remelt.recipe.node import Model, Node, Parameter
from remelt.recipe.signature import name_all_models
from remelt.recipe.walk import rewrite, topological
from remelt.text.writer import write_recipe


def portable_text(
    recipe: Node,
    methods: Mapping[str, Method[..., Any]],
    models_dirs: Sequence[Path],
    folder: Path | None = None,
) -> str:
    """The recipe as text with every model by a relative name; tensors in memory become parameters.

    Models that are distinct keep distinct names. With the recipe's ``folder``, relative names that another model's
    resembles are made longer too.
    """

    root = name_all_models(recipe, methods)
    models = [node for node in topological(root) if isinstance(node, Model)]
    names = portable_names([model.name for model in models if model.tensors is None], models_dirs, folder)
    if all(model.tensors is None and names[model.name] == model.name for model in models):
        return write_recipe(root)
    taken: dict[int, str] = {}

    def travel(node: Node) -> Node:
        if not isinstance(node, Model):
            return node
        if node.tensors is not None:
            return _held(node, taken)
        name = names[node.name]
        return node if name == node.name else Model(name, node.sha256, node.space, node.arch)

    return write_recipe(rewrite(root, travel))


def _held(model: Model, taken: dict[int, str]) -> Parameter:
    """The parameter that stands for tensors in memory; ``taken`` has the names of those before, by identity."""
    name = model.name if model.name.isidentifier() else "memory"
    used = set(taken.values())
    if id(model.tensors) not in taken:
        taken[id(model.tensors)] = name if name not in used else f"{name}_{len(used) + 1}"
    return Parameter(taken[id(model.tensors)], space=model.space, arch=model.arch)


def portable_names(
    names: Iterable[str], models_dirs: Sequence[Path] = (), folder: Path | None = None
) -> dict[str, str]:
    """Models' names without the places of one machine, distinct where the models are.

    A relative name that does not leave its folder stays. Of any other the last part is left, or what follows a models
    folder, and as many parts before as tell it from every other model.

    >>> portable_names(["/home/me/models/a.safetensors", "../b", "sdxl/c"]).values()
    dict_values(['a.safetensors', 'b', 'sdxl/c'])
    >>> portable_names(["/home/me/v1/m", "/home/me/v2/m"]).values()
    dict_values(['v1/m', 'v2/m'])
    """
    places = {name: _place(name, models_dirs, folder) for name in names}
    identities = {place.identity: number for number, place in enumerate(places.values())}
    moving = [place for place in places.values() if not place.stays]
    all_folded, all_exact = (_Tails(places.values(), identities, fold) for fold in (str.casefold, str))
    moving_folded = _Tails(moving, identities, str.casefold)
    found: dict[str, str] = {}
    for name, place in places.items():
        if place.stays and moving_folded.distinct_from(place) == place.least:
            found[name] = name
            continue
        count = all_folded.distinct_from(place) or all_exact.distinct_from(place)
        found[name] = _fallback(name, place) if count is None else "/".join(place.parts[-count:])
    _keep_apart(found, places)
    return found


@dataclass(frozen=True)
class _Place:
    """Where a model is, as far as its name tells: parts of its path, of which at least the last ``least`` are shown.

    ``identity`` is another for another model; ``stays`` is a name that is portable as it was written.
    """

    parts: tuple[str, ...]
    least: int
    identity: tuple[str, ...]
    stays: bool = False


def _place(name: str, models_dirs: Sequence[Path], folder: Path | None) -> _Place:
    expanded = os.path.expanduser(name) if name.startswith("~") else name
    windows = PureWindowsPath(expanded)
    anchor = windows.drive or (windows.root if windows.is_absolute() else PurePosixPath(expanded).root)
    if not anchor and expanded.startswith("~"):
        anchor, _, expanded = expanded.partition("/")
        windows = PureWindowsPath(expanded)
    parts = windows.parts if "\\" in expanded or windows.drive else PurePosixPath(expanded).parts
    if not anchor and ".." not in parts:
        return _as_written(name, parts, folder)
    if not anchor and folder is not None:
        return _absolute(folder.joinpath(*parts), models_dirs)
    if not anchor:
        normal = tuple(posixpath.normpath("/".join(parts)).split("/"))
        return _described(tuple(part for part in normal if part != "..") or ("model",), 1, normal)
    path = Path(expanded)
    if path.is_absolute():
        return _absolute(path, models_dirs)
    inner = [part for part in parts if part != windows.anchor]
    return _rooted(anchor, inner)


def _as_written(name: str, parts: tuple[str, ...], folder: Path | None) -> _Place:
    """A relative name: it stays, and where its file is known, it can be told from others that resemble it."""
    for path in () if folder is None else (Path(name).absolute(), folder / name):
        if any(os.path.exists(f"{path}{suffix}") for suffix in ("", *SUFFIXES)):
            return replace(_absolute(path, ()), least=max(len(parts), 1), stays=True)
    own = parts or (".",)
    return replace(_described(own, len(own), (".", *own)), stays=True)


def _absolute(path: Path, models_dirs: Sequence[Path]) -> _Place:
    """A whole path; below a models folder, all that follows the folder is shown."""
    path = Path(os.path.abspath(path))
    below: list[int] = []
    for folder in models_dirs:
        for base, candidate in ((Path(os.path.abspath(folder)), path), (folder.resolve(), path.resolve())):
            if base in candidate.parents and candidate.name == path.name:
                below.append(len(candidate.relative_to(base).parts))
    return _rooted(path.drive, path.parts[1:], below[0] if below else 1)


def _rooted(anchor: str, inner: Sequence[str], least: int = 1) -> _Place:
    """A whole path by its root, as a part like any other, and what follows."""
    normal = [part for part in posixpath.normpath("/" + "/".join(inner)).split("/") if part]
    full = (re.sub(r"\W+", "_", anchor).strip("_") or "root", *(normal or ("model",)))
    return _described(full, min(least, len(full)), full)


def _described(parts: tuple[str, ...], least: int, identity: tuple[str, ...]) -> _Place:
    return _Place(parts, least, (*identity[:-1], _split(identity[-1])[0]))


def _split(part: str) -> tuple[str, str]:
    """A file's name without its suffix, and the suffix: a model may be named without it."""
    stem, suffix = posixpath.splitext(part)
    return (stem, suffix.lower()) if suffix.lower() in SUFFIXES else (part, "")


@dataclass(slots=True)
class _Tail:
    """What ends alike: the models by their suffix, and what stands one part before."""

    models: dict[str, set[int]] = field(default_factory=dict)
    longer: dict[str, _Tail] = field(default_factory=dict)


class _Tails:
    """The ends of paths, to find how much of one tells it from every other."""

    def __init__(
        self, places: Iterable[_Place], identities: Mapping[tuple[str, ...], int], fold: Callable[[str], str]
    ) -> None:
        self.identities, self.fold = identities, fold
        self.root = _Tail()
        for place in places:
            tail, identity = self.root, identities[place.identity]
            for part, suffix in self.parts_of(place):
                tail = tail.longer.setdefault(part, _Tail())
                tail.models.setdefault(suffix, set()).add(identity)

    def parts_of(self, place: _Place) -> Iterable[tuple[str, str]]:
        """The path's parts from its end, each with the file's suffix."""
        stem, suffix = _split(place.parts[-1])
        return ((self.fold(part), suffix) for part in (stem, *reversed(place.parts[:-1])))

    def distinct_from(self, place: _Place) -> int | None:
        """How many of the last parts no other model has; None where all of them are another's too."""
        tail, identity = self.root, self.identities[place.identity]
        for count, (part, suffix) in enumerate(self.parts_of(place), start=1):
            found = tail.longer.get(part)
            if found is None:
                return max(count, place.least)
            tail = found
            alike = tail.models if not suffix else {one: tail.models.get(one, set()) for one in ("", suffix)}
            if count >= place.least and not any(others - {identity} for others in alike.values()):
                return count
        return None


def _fallback(name: str, place: _Place) -> str:
    """For what no end of its path tells apart: a relative name as it is, else the whole path without its root."""
    whole = "/".join(place.parts)
    return name if place.stays or ".." in place.identity else whole


def _keep_apart(found: dict[str, str], places: Mapping[str, _Place]) -> None:
    """Number names that two models got nevertheless: such a name is found nowhere, which is better than another's."""
    owners: dict[str, tuple[str, ...]] = {}
    for name in sorted(found, key=lambda name: not places[name].stays):
        text, number = found[name], 2
        while owners.setdefault(found[name], places[name].identity) != places[name].identity:
            found[name] = f"{number}/{text}"
            number += 1
