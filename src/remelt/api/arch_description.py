"""Everything that is known of a named arch, as plain data: what `remelt info` tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from remelt.archs.arch import Arch, Component, Dim, Sign, Variant, all_archs, find_arch
from remelt.archs.dialects import ORIGINAL, dialects_of
from remelt.archs.facts import NEVER_MERGED, Layout, layout
from remelt.archs.maps import templates
from remelt.archs.shapes import shapes_of


def describe_archs() -> list[dict[str, str]]:
    """The named archs, each with its title."""
    return [{"name": name, "title": arch.title} for name, arch in all_archs().items()]


def describe_arch(name: str) -> dict[str, Any]:
    """Everything that is known of a named arch: its parts as a full-size model has them, and what tells it from others.

    Components, blocks and groups with their keys and further names; layer classes; the keys and shapes by which it is
    recognised, its variants and near misses; keys that are copied, tied, averages of others, or spelled otherwise in
    some files; its dialects, with what each renames and has no place for; what user interfaces are told of it.
    """
    arch = find_arch(name)
    found = layout(tuple(shapes_of(name) or ()), arch)
    return {
        "title": arch.title,
        "part": arch.part,
        "components": {one: list(keys) for one, keys in found.components.items()},
        "component_names": {one.name: _names(one) for one in arch.components},
        "blocks": {block: list(keys) for block, keys in found.blocks.items()},
        "block_names": {block: list(found.facts(keys[0]).blocks[1:]) for block, keys in found.blocks.items()},
        "block_runs": list(_runs(found)),
        "groups": {group: list(keys) for group, keys in found.groups.items()},
        "preset": list(arch.preset),
        "classes": list(found.layer_classes),
        "recognised": [[_shown(sign) for sign in signs] for signs in arch.recognise],
        "variants": {one.name: one.note for one in arch.variants},
        "variant_signs": _signs(arch.variants),
        "near": {one.name: one.note for one in arch.near},
        "near_signs": _signs(arch.near),
        "copied": [*arch.copied, *NEVER_MERGED],
        "tied": [list(names) for names in arch.tied],
        "averages": {} if arch.shadow is None else {"prefix": arch.shadow.prefix, "of": list(arch.shadow.of)},
        "other_starts": [{"found": found, "usual": usual} for found, usual in arch.other_starts],
        "dialects": {dialect: _dialect(arch, dialect) for dialect in dialects_of(arch)},
        "modelspec": dict(arch.modelspec),
    }


def _names(component: Component) -> dict[str, list[str]]:
    return {
        "aliases": list(component.aliases),
        "prefixes": list(component.prefixes),
        "bare": list(component.bare),
    }


def _dialect(arch: Arch, dialect: str) -> dict[str, dict[str, Any]]:
    """The components that a dialect names otherwise, each with its place, its rules, and what it has no place for."""
    return {
        component.name: {
            "folder": one.folder,
            "prefix": one.prefix,
            "left_out": list(one.left_out),
            "renames": [list(pair) for pair in templates(one.key_map, one.below)],
        }
        for component in arch.components
        for one in component.dialects
        if one.dialect == dialect and dialect != ORIGINAL
    }


def _runs(found: Layout) -> Iterator[dict[str, Any]]:
    """Neighbouring blocks of one make: the first and the last of them, and the keys with ``{i}`` for their number."""
    made = {block: tuple(_numbered(found, key) for key in keys) for block, keys in found.blocks.items()}
    for (_, keys), run in groupby(made, lambda block: (block.rstrip("0123456789"), made[block])):
        blocks = list(run)
        numbered = len(blocks) > 1
        yield {"blocks": blocks, "keys": list(keys if numbered else found.blocks[blocks[0]])}


def _numbered(found: Layout, key: str) -> str:
    """A key with ``{i}`` for its place in its stack."""
    facts = found.facts(key)
    if facts.stack is None or found.arch is None:
        return key
    canonical = found.arch.canonical(key)
    if not canonical.startswith(f"{facts.stack}."):
        return key
    start = len(facts.stack) + 1 - (len(canonical) - len(key))
    return f"{key[:start]}{{i}}.{key[start:].partition('.')[2]}"


def _signs(variants: tuple[Variant, ...]) -> Mapping[str, list[str]]:
    return {one.name: [_shown(sign) for sign in one.signs] for one in variants}


def _shown(sign: Sign) -> str:
    """A sign as an arch file says it: sizes that only a model of full size has bear ``~``."""
    if sign.shape is None:
        return f"no {sign.key}"
    return f"{sign.key} [{', '.join(map(_size, sign.shape))}]"


def _size(dim: Dim) -> str:
    return f"~{dim}" if dim.full else str(dim)
