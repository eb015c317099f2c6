"""A named arch, as one small declarative file says it: the names that people use for the parts of a known model."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path
from types import MappingProxyType, ModuleType

from remelt.archs import named
from remelt.archs.reader import Table, read_table
from remelt.core.registry import Registry
from remelt.errors import OptionError


@dataclass(frozen=True)
class ComponentDialect:
    """Another layout of a component: the ``dialect``, the folder that holds it there, and the ``key_map`` by name.

    A layout of single files has a ``prefix`` of keys instead of a folder. ``left_out`` are globs over the component's
    keys, without prefix, for which that layout has no place. ``below`` is what originals begin with in the map where
    the component lacks it.
    """

    dialect: str
    folder: str
    key_map: str
    left_out: tuple[str, ...]
    prefix: str = ""
    below: str = ""


@dataclass(frozen=True)
class Component:
    """A part of the model: its keys begin with one of ``prefixes``.

    ``bare`` are beginnings of keys in files that hold this component alone, without the first of its prefixes.
    ``dialects`` are other layouts of it.
    """

    name: str
    aliases: tuple[str, ...]
    prefixes: tuple[str, ...]
    bare: tuple[str, ...]
    dialects: tuple[ComponentDialect, ...] = ()


@dataclass(frozen=True)
class BlockName:
    """A name for a block: the keys that begin with one of ``paths``, where ``{i}`` stands for a number.

    >>> BlockName(("blocks.{i}.",), "IN{i:02d}", ("in{i}",)).match("blocks.3.weight")
    ('IN03', 'in3')
    """

    paths: tuple[str, ...]
    name: str
    aliases: tuple[str, ...]

    def match(self, key: str) -> tuple[str, ...] | None:
        """The block's names where the key is in it, the display name first."""
        for pattern in _path_patterns(self.paths):
            found = pattern.match(key)
            if found is not None:
                number = int(found[1]) if pattern.groups else 0
                return tuple(name.format(i=number) for name in (self.name, *self.aliases))
        return None


@functools.cache
def _path_patterns(paths: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(re.escape(path).replace(r"\{i\}", r"(\d{1,6})")) for path in paths)


@dataclass(frozen=True)
class Group:
    """A name for all keys whose block's display name matches none of the globs ``outside``."""

    name: str
    aliases: tuple[str, ...]
    outside: tuple[str, ...]


@dataclass(frozen=True)
class Dim:
    """What one dimension may be: between two bounds, or one of the sizes of a full-size model.

    ``full`` holds only where the model is of full size: one with the same keys and smaller widths is of the arch too.
    """

    low: int
    high: int | None
    full: tuple[int, ...] = ()

    def fits(self, size: int, *, scaled: bool) -> bool:
        """Whether a dimension may be of that size."""
        if self.full and not scaled and size not in self.full:
            return False
        return self.low <= size and (self.high is None or size <= self.high)

    def __str__(self) -> str:
        if self.full:
            return "|".join(map(str, self.full))
        if self.high is None:
            return "*" if self.low == 0 else f"{self.low}.."
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Sign:
    """A key that must be there, with its shape; ``shape`` None says that it must not be there."""

    key: str
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        return self.key if self.shape is None else f"{self.key} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Variant:
    """A model of the arch that differs in a way worth a word, such as the 9 input channels of inpainting."""

    name: str
    note: str
    signs: tuple[Sign, ...]


@dataclass(frozen=True)
class Shadow:
    """Keys that are a running average of others: ``prefix``, then the other's name after one of ``of``, undotted."""

    prefix: str
    of: tuple[str, ...]


@dataclass(frozen=True)
class Arch:
    """A known arch: how to recognise it, and what its parts are called.

    ``preset`` are the block names that a preset string of numbers speaks of, in order; ``copied`` are globs over keys
    that are never merged; ``recognise`` lists alternatives, one of which must hold whole; ``near`` are models of other
    makes that come close, each with what to say of it.
    """

    name: str
    title: str
    recognise: tuple[tuple[Sign, ...], ...]
    variants: tuple[Variant, ...]
    near: tuple[Variant, ...]
    components: tuple[Component, ...]
    blocks: tuple[BlockName, ...]
    groups: tuple[Group, ...]
    preset: tuple[str, ...]
    copied: tuple[str, ...]
    shadow: Shadow | None = None
    part: bool = False
    """Whether it is a part of models of other archs, such as a VAE, which may stand beside them in a recipe."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Keys that are one tensor in the model: where a file has several of a row, they hold the same numbers."""
    other_starts: tuple[tuple[str, str], ...] = ()
    """What keys of some files begin with, and what they usually begin with."""
    modelspec: Mapping[str, str] = field(default_factory=dict)
    """What user interfaces are told of a model of this arch, by the names of the ModelSpec standard."""

    def __repr__(self) -> str:
        return f"<Arch {self.name}>"

    @functools.cached_property
    def prefixes(self) -> tuple[str, ...]:
        """What the canonical keys of any component begin with."""
        return tuple(prefix for component in self.components for prefix in component.prefixes)

    def canonical(self, key: str) -> str:
        """The key as a whole checkpoint spells it: files that hold one component alone may leave out its prefix."""
        key = self.usual(key)
        if key.startswith(self.prefixes):
            return key
        for component in self.components:
            if component.bare and key.startswith(component.bare):
                return component.prefixes[0] + key
        return key

    def usual(self, key: str) -> str:
        """The key with the beginning that it usually has."""
        return next((usual + key[len(start) :] for start, usual in self.other_starts if key.startswith(start)), key)

    def others(self, key: str) -> Iterator[str]:
        """The names that some files have for a canonical key."""
        return (start + key[len(usual) :] for start, usual in self.other_starts if key.startswith(usual))

    def component_of(self, key: str) -> tuple[Component, str] | None:
        """The component of a canonical key, and the rest of the key after the prefix."""
        for component in self.components:
            for prefix in component.prefixes:
                if key.startswith(prefix):
                    return component, key[len(prefix) :] if prefix.endswith((".", "/")) else key
        return None

    def block_of(self, key: str) -> tuple[str, ...]:
        """The names of the block of a canonical key, the display name first; none outside the named blocks."""
        return next((names for block in self.blocks if (names := block.match(key)) is not None), ())

    def is_copied(self, key: str) -> bool:
        """Whether a canonical key is never merged."""
        return Globs.of(self.copied).match(key)


@dataclass(frozen=True)
class Globs:
    """Some globs, sorted by what it takes to hold a text against them: most ask for a beginning or an end.

    >>> globs = Globs.of(("*.inv_freq", "edm_*", "*cumprod*", "layer_?"))
    >>> [globs.match(text) for text in ("a.inv_freq", "edm_mean", "a_cumprod_b", "layer_1", "layer_10")]
    [True, True, True, True, False]
    """

    whole: frozenset[str]
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    inside: tuple[str, ...]
    others: re.Pattern[str] | None

    @staticmethod
    @functools.cache
    def of(globs: tuple[str, ...]) -> Globs:
        """The globs as they may be matched."""
        kinds: dict[tuple[bool, bool], list[str]] = {}
        others = []
        for glob in globs:
            words = glob[glob.startswith("*") : len(glob) - (len(glob) > 1 and glob.endswith("*"))]
            if any(sign in words for sign in "*?["):
                others.append(translate(glob))
            else:
                kinds.setdefault((glob.startswith("*"), len(glob) > 1 and glob.endswith("*")), []).append(words)
        whole, starts, ends, inside = (
            tuple(kinds.get(kind, ())) for kind in ((False, False), (False, True), (True, False), (True, True))
        )
        return Globs(frozenset(whole), starts, ends, inside, re.compile("|".join(others)) if others else None)

    def match(self, text: str) -> bool:
        """Whether any of the globs matches the whole text."""
        if text.startswith(self.starts) or text.endswith(self.ends) or text in self.whole:
            return True
        for part in self.inside:
            if part in text:
                return True
        return self.others is not None and self.others.match(text) is not None


def read_arch(path: Path) -> Arch:
    """The arch that a TOML file declares; `OptionError` says what is wrong with the file."""
    table = read_table(path)
    arch = Arch(
        name=table.text("name"),
        title=table.text("title"),
        recognise=tuple(_signs(entry) for entry in table.tables("recognise")),
        variants=tuple(map(_variant, table.tables("variant"))),
        near=tuple(map(_variant, table.tables("near"))),
        components=tuple(_component(entry) for entry in table.tables("component")),
        blocks=tuple(_block(entry) for entry in table.tables("block")),
        groups=tuple(
            Group(entry.text("name"), entry.texts("aliases"), entry.texts("outside")) for entry in table.tables("group")
        ),
        preset=tuple(name for entry in table.texts("preset") for name in _range(entry)),
        copied=table.texts("copied"),
        shadow=next((Shadow(entry.text("prefix"), entry.texts("of")) for entry in table.tables("shadow")), None),
        part=table.flag("part"),
        tied=tuple(table.lists("tied")),
        other_starts=tuple(pair for entry in table.tables("other_start") for pair in _other_starts(entry)),
        modelspec=dict(table.table("modelspec").pairs_of_text()),
    )
    table.refuse_unknown()
    if not arch.recognise:
        raise table.error("it needs at least one [[recognise]] table")
    return arch


def _variant(entry: Table) -> Variant:
    return Variant(entry.text("name"), entry.text("note"), _signs(entry))


def _component(entry: Table) -> Component:
    component = Component(
        entry.text("name"),
        entry.texts("aliases"),
        entry.texts("prefixes"),
        entry.texts("bare"),
        tuple(map(_dialect, entry.tables("dialect"))),
    )
    if not component.prefixes:
        raise entry.error("a component needs at least one prefix")
    return component


def _other_starts(entry: Table) -> Iterator[tuple[str, str]]:
    """What each of the parts ``of`` something begins with in some files, and what it usually begins with."""
    found, usual, parts = entry.text_or_nothing("found"), entry.text_or_nothing("usual"), entry.texts("of")
    if not parts or found == usual:
        raise entry.error("another start needs the parts that it is of, and another one than the usual")
    return ((found + part, usual + part) for part in parts)


def _dialect(entry: Table) -> ComponentDialect:
    folder, prefix = entry.text_or_nothing("folder"), entry.text_or_nothing("prefix")
    if bool(folder) == bool(prefix):
        raise entry.error("a dialect needs a folder, or a prefix of keys in single files")
    return ComponentDialect(
        entry.text("name"), folder, entry.text("map"), entry.texts("left_out"), prefix, entry.text_or_nothing("below")
    )


def _block(entry: Table) -> BlockName:
    block = BlockName(entry.texts("paths"), entry.text("name"), entry.texts("aliases"))
    if not block.paths or any(path.count("{i}") > 1 for path in block.paths):
        raise entry.error("a block needs paths with at most one {i} each")
    try:
        for name in (block.name, *block.aliases):
            name.format(i=0)
    except (LookupError, ValueError, AttributeError) as error:
        raise entry.error(f"{block.name!r} or one of its aliases is no template of {{i}}: {error}") from error
    return block


def _signs(entry: Table) -> tuple[Sign, ...]:
    present = [Sign(key, tuple(_dim(entry, dim) for dim in shape)) for key, shape in entry.shapes("keys")]
    return (*present, *(Sign(key, None) for key in entry.texts("absent")))


_DIM = re.compile(r"(?P<any>\*)|(?P<low>\d{1,9})\.\.(?P<high>\d{1,9})?|~(?P<full>\d{1,9}(?:\|\d{1,9})*)")


def _dim(entry: Table, value: int | str) -> Dim:
    """``4`` exactly, ``"*"`` any, ``"4..9"`` or ``"4.."`` between bounds, ``"~320|384"`` one of these at full size."""
    if isinstance(value, int):
        return Dim(value, value)
    found = _DIM.fullmatch(value)
    if found is None:
        raise entry.error(f'{value!r} is no dimension: write 4, "*", "4..9", "4.." or "~320"')
    if found["any"]:
        return Dim(0, None)
    if found["full"]:
        return Dim(1, None, tuple(int(size) for size in found["full"].split("|")))
    return Dim(int(found["low"]), int(found["high"]) if found["high"] else None)


def _range(entry: str) -> Iterator[str]:
    """The names that ``IN00..IN11`` stands for."""
    found = re.fullmatch(r"(\D*)(\d{1,4})\.\.\1(\d{1,4})", entry)
    if found is None:
        yield entry
        return
    for number in range(int(found[2]), int(found[3]) + 1):
        yield f"{found[1]}{number:0{len(found[2])}d}"


def _collect(module: ModuleType) -> Mapping[str, Arch]:
    paths = getattr(module, "ARCH_FILES", ())
    return {arch.name: arch for arch in map(read_arch, map(Path, paths))}


@functools.cache
def _registry() -> Registry[Arch]:
    registry = Registry("arch", package="remelt.archs.named", group="remelt.archs", collect=_collect)
    registry.add_module(named)
    return registry


def all_archs() -> Mapping[str, Arch]:
    """Every known arch by name: ours, those of installed packages, and added files.

    A package offers archs by an entry point of the group ``remelt.archs`` that names a module with a list of paths,
    ``ARCH_FILES``.
    """
    return MappingProxyType(_registry())


def find_arch(name: str) -> Arch:
    """The arch of that name, or `RecipeError` with the nearest names.

    >>> find_arch("sd1").preset[:3]
    ('BASE', 'IN00', 'IN01')
    """
    return _registry().find(name)


def add_arch_file(path: Path) -> Arch:
    """Make the arch that a TOML file declares known by its name; a name that is taken raises `OptionError`."""
    if not path.is_file():
        raise OptionError(f"arch file {path} is not a file", hint="give the path of a TOML file")
    arch = read_arch(path)
    module = ModuleType(str(path))
    module.ARCH_FILES = [path]  # type: ignore[attr-defined]
    len(_registry())
    _registry().add_module(module)
    return find_arch(arch.name)
