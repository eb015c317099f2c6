"""What block weights and reports need to know of a key: its component, its blocks, its kind of layer."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from remelt.archs.arch import Arch, Globs
from remelt.archs.block_names import BlockNames
from remelt.archs.dialects import IN_FULL, Spelling, original_key
from remelt.archs.structure import Place, Structure, infer, is_number
from remelt.errors import RecipeError

NEVER_MERGED = ("*.inv_freq", "*position_ids", "*.num_batches_tracked", "safety_checker/*", "image_encoder/*")
"""Keys that no arch learns: tables made from the configuration, counters, and what stands beside a pipeline."""

_LEAVES = frozenset({"weight", "bias", "scale", "gamma", "beta", "weight_scale", "weight_scale_inv", "scale_weight"})
"""Names of a layer's own tensors, which are no part of the layer's name."""

_KINDS = {
    "attn": re.compile(r"(?:.*_)?\w*(?:attn|attention|attentions)"),
    "mlp": re.compile(r"(?:.*_)?(?:mlp|ff|ffn|feed_forward|feedforward|dense_relu_dense|moe)"),
    "norm": re.compile(r"(?:.*_)?(?:\w*norm|ln|ln_f)"),
}
"""Words for kinds of layers, and how model authors spell them (lower case, camel case split, trailing digits cut)."""


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What is known of one key.

    ``component`` is the canonical name (``unet``), ``component_names`` it and its aliases. ``blocks`` are the names of
    the block that the key is in, the one to show first: a place in a stack, or else the outermost module that holds no
    stack, such as ``final_layer``. ``groups`` are the names of what
    gathers many blocks, such as ``BASE``. ``stack`` is the path of the stack, ``index`` the position in it (0 is first)
    of ``count``; None, 0, 0 outside. ``layer`` are the names inside the block down to the layer: ``("attn1", "to_q")``.
    ``copied`` keys are never merged.
    """

    key: str
    component: str
    blocks: tuple[str, ...]
    stack: str | None
    index: int
    count: int
    layer: tuple[str, ...]
    copied: bool
    groups: tuple[str, ...] = ()
    component_names: tuple[str, ...] = ()


class Layout:
    """An arch, or none, applied to a set of keys. What is asked of it is found when it is first asked.

    ``keys`` in natural order; ``components`` by canonical name and ``component_aliases`` to it; ``blocks`` by display
    name, no key in two; ``groups`` by name; ``block_names`` is everything that may be written for a block or a group,
    and ``ambiguous`` the short names that several blocks would answer to, with the names that are meant.
    """

    def __init__(self, keys: Iterable[str], arch: Arch | None, spelling: Spelling = IN_FULL) -> None:
        self.arch = arch
        self._canonical = {key: key if arch is None else original_key(arch, spelling, key) for key in keys}
        self._matches: dict[tuple[tuple[str, ...], str], bool] = {}

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(sorted(self._canonical, key=natural_order))

    @functools.cached_property
    def copied(self) -> frozenset[str]:
        """The keys that are never merged."""
        shadow = None if self.arch is None else self.arch.shadow
        if shadow is not None and any(key.startswith(shadow.prefix) for key in self._canonical):
            return frozenset(key for key, facts in self._facts.items() if facts.copied)
        return self._copied

    @functools.cached_property
    def _copied(self) -> frozenset[str]:
        """The keys that are never merged by their own names."""
        globs = Globs.of(NEVER_MERGED if self.arch is None else (*NEVER_MERGED, *self.arch.copied))
        return frozenset(key for key, canonical in self._canonical.items() if globs.match(canonical))

    @functools.cached_property
    def _facts(self) -> Mapping[str, KeyFacts]:
        if self.arch is None or self.arch.shadow is None:
            return self._own_facts
        return {**self._own_facts, **_shadowed(self._own_facts, self._canonical, self.arch)}

    @functools.cached_property
    def _own_facts(self) -> Mapping[str, KeyFacts]:
        """The facts of every key by its own name, whatever it is a running average of."""
        names, places = _Names(self._block_names, self.arch), self._structure.places
        return {
            key: names.facts(key, canonical, places[canonical], key in self._copied)
            for key, canonical in ((key, self._canonical[key]) for key in self.keys)
        }

    @functools.cached_property
    def _structure(self) -> Structure:
        return infer(self._canonical[key] for key in self.keys)

    @functools.cached_property
    def _block_names(self) -> BlockNames:
        return BlockNames(self._structure, self.arch)

    @functools.cached_property
    def components(self) -> Mapping[str, tuple[str, ...]]:
        return _grouped((entry.component, entry.key) for entry in self._facts.values())

    @functools.cached_property
    def component_aliases(self) -> Mapping[str, str]:
        entries = self._facts.values()
        return MappingProxyType({alias: entry.component for entry in entries for alias in entry.component_names[1:]})

    @functools.cached_property
    def blocks(self) -> Mapping[str, tuple[str, ...]]:
        return _grouped((entry.blocks[0], entry.key) for entry in self._facts.values())

    @functools.cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        return _grouped(
            (group.name, entry.key)
            for group in (self.arch.groups if self.arch is not None else ())
            for entry in self._facts.values()
            if group.name in entry.groups
        )

    @functools.cached_property
    def block_names(self) -> frozenset[str]:
        written = {name for entry in self._facts.values() for name in (*entry.blocks, *entry.groups)}
        return frozenset(written | set(self.arch.preset if self.arch is not None else ()))

    @functools.cached_property
    def layer_classes(self) -> tuple[str, ...]:
        classes = {".".join(layer) for layer in {entry.layer for entry in self._facts.values()} if layer}
        return tuple(sorted(classes, key=natural_order))

    @functools.cached_property
    def ambiguous(self) -> Mapping[str, tuple[str, ...]]:
        meant: dict[str, dict[str, None]] = {}
        for key, canonical in self._canonical.items():
            for name in self._block_names.shared(canonical, self._structure.places[canonical]):
                if name not in self.block_names:
                    meant.setdefault(name, {})[self._own_facts[key].blocks[0]] = None
        return MappingProxyType({name: tuple(sorted(found, key=natural_order)) for name, found in meant.items()})

    def facts(self, key: str) -> KeyFacts:
        """The facts of a key of this layout; `RecipeError` for another one."""
        found = self._facts.get(key)
        if found is None:
            raise RecipeError(f"{key!r} is none of the {len(self._canonical)} keys of this model")
        return found

    def matches_class(self, facts: KeyFacts, pattern: str) -> bool:
        """Whether a key's layer is of the class that a pattern of dotted names says.

        The pattern's names must appear one after another in ``facts.layer``, each equal to the name there as it is
        written or without trailing digits and underscores (``conv`` finds ``conv1``; ``attn1`` finds only ``attn1``,
        and ``attn1.to_q`` only its ``to_q``). The words ``attn``, ``mlp`` and ``norm`` also stand for the field's other
        spellings of these kinds, judged by a name's last word: ``self_attn``, ``SelfAttention``, ``img_mlp``, ``ff``,
        ``feed_forward``, ``input_layernorm``, ``q_norm``, ``ln_1``.
        """
        asked = (facts.layer, pattern)
        known = self._matches.get(asked)
        if known is None:
            known = self._matches[asked] = class_matches(facts.layer, pattern)
        return known

    def is_component(self, facts: KeyFacts, name: str) -> bool:
        """Whether a key's component bears that name, canonical or alias."""
        return name == facts.component or name in facts.component_names

    def preset_names(self, count: int) -> tuple[str, ...]:
        """The block names, in order, that a preset string of so many numbers speaks of.

        One number fewer than the arch's preset leaves out the first name, ``BASE``. `RecipeError` for another count.
        """
        names = self.arch.preset if self.arch is not None else ()
        if names and count in (len(names), len(names) - 1):
            return names[len(names) - count :]
        what = "a model of no known arch" if self.arch is None else self.arch.name
        if not names:
            raise RecipeError(
                f"{what} has no preset order of blocks", hint="write names, as in blocks({'layers.3': 0.2})"
            )
        raise RecipeError(
            f"a preset string for {what} is {len(names) - 1} or {len(names)} numbers, but this one has {count}",
            hint=f"{names[0]}, {names[1]} .. {names[-1]}; {names[0]} may be left out",
        )


def layout(keys: Sequence[str], arch: Arch | None, spelling: Spelling = IN_FULL) -> Layout:
    """The facts of every key, under the names of an arch, or by structure alone.

    Keys that are spelled otherwise have the facts of what they are in the original dialect.

    >>> found = layout(["layers.0.attn.weight", "layers.1.attn.weight"], None)
    >>> found.facts("layers.1.attn.weight").blocks, list(found.blocks)
    (('layers.1',), ['layers.0', 'layers.1'])
    """
    return Layout(keys, arch, spelling)


class _Names:
    """What keys are called, by an arch or by none; what is the same for many keys is found once."""

    def __init__(self, blocks: BlockNames, arch: Arch | None) -> None:
        self.blocks, self.arch = blocks, arch
        self.groups: dict[str, tuple[str, ...]] = {}

    def facts(self, key: str, canonical: str, place: Place, copied: bool) -> KeyFacts:
        """The facts of a key that stands at a place."""
        inner = place.inner
        component: tuple[str, ...] = (place.component,)
        if self.arch is not None:
            found = self.arch.component_of(canonical)
            if found is not None:
                component = (found[0].name, *found[0].aliases)
                inner = inner if place.stack is not None else tuple(found[1].split("."))
        blocks = self.blocks.of(key, canonical, place)
        return KeyFacts(
            key=key,
            component=component[0],
            blocks=blocks,
            stack=place.stack,
            index=place.index,
            count=place.count,
            layer=layer_names(inner),
            copied=copied,
            groups=self.groups_outside(blocks[0]),
            component_names=component,
        )

    def groups_outside(self, block: str) -> tuple[str, ...]:
        """The names of the groups that gather what is outside of other blocks than this one."""
        if block not in self.groups:
            self.groups[block] = tuple(
                name
                for group in (() if self.arch is None else self.arch.groups)
                if not Globs.of(group.outside).match(block)
                for name in (group.name, *group.aliases)
            )
        return self.groups[block]


def _shadowed(facts: Mapping[str, KeyFacts], canonical: Mapping[str, str], arch: Arch) -> dict[str, KeyFacts]:
    """The facts of keys that are a running average of others: those of the others, but for the component."""
    shadow = arch.shadow
    found: dict[str, KeyFacts] = {}
    if shadow is None or not any(key.startswith(shadow.prefix) for key in facts):
        return found
    for key, original in facts.items():
        for start in shadow.of:
            name = shadow.prefix + canonical[key].removeprefix(start).replace(".", "")
            if canonical[key].startswith(start) and name in facts:
                own = facts[name]
                found[name] = replace(original, key=name, component=own.component, component_names=own.component_names)
    return found


def layer_names(inner: Sequence[str]) -> tuple[str, ...]:
    """The names that say which layer a key belongs to, from the segments inside its block.

    Numbers and the tensor's own name (``weight``, ``bias``, ``scale`` ...) are left out, and so is the path down to an
    element of an inner stack.

    >>> layer_names(["1", "transformer_blocks", "0", "attn1", "to_out", "0", "weight"])
    ('attn1', 'to_out')
    >>> layer_names(["mlp", "experts", "7", "gate_proj", "weight"]), layer_names(["attn", "in_proj_bias"])
    (('mlp', 'experts', 'gate_proj'), ('attn', 'in_proj'))
    """
    segments = list(inner)
    if segments and segments[-1] in _LEAVES:
        segments.pop()
    elif segments:
        segments[-1] = re.sub(r"(?<=.)_(weight|bias)$", "", segments[-1])
    start, names = 0, 0
    for at in range(len(segments) - 1, -1, -1):
        if not is_number(segments[at]):
            names += 1
        elif names >= 2 or (names and at and segments[at - 1].endswith(("block", "blocks", "layer", "layers"))):
            start = at + 1
            break
    return tuple(segment for segment in segments[start:] if not is_number(segment))


def class_matches(layer: Sequence[str], pattern: str) -> bool:
    """Whether the names of a pattern stand one after another in those of a layer, as `Layout.matches_class` says.

    >>> class_matches(("attn1", "to_q"), "attn.to_q"), class_matches(("post_attention_layernorm",), "attn")
    (True, False)
    """
    asked = pattern.split(".")
    return any(
        all(_is_called(name, word) for name, word in zip(layer[start:], asked, strict=False))
        for start in range(len(layer) - len(asked) + 1)
    )


@functools.lru_cache(maxsize=16384)
def _is_called(name: str, word: str) -> bool:
    if word in (name, name.rstrip("0123456789_")):
        return True
    kind = _KINDS.get(word)
    return kind is not None and kind.fullmatch(_folded(name)) is not None


def _folded(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().rstrip("0123456789_")


def natural_order(text: str) -> tuple[tuple[tuple[str, int, str], ...], ...]:
    """A sorting key by which ``block.2`` stands before ``block.10``, and ``txt.0`` before ``txt2.0``."""
    return tuple(_segment_order(segment) for segment in text.split("."))


@functools.lru_cache(maxsize=16384)
def _segment_order(segment: str) -> tuple[tuple[str, int, str], ...]:
    parts = re.split(r"([0-9]+)", segment)
    numbers = [number.lstrip("0") for number in parts[1::2]] + [""]
    return tuple((words, len(number), number) for words, number in zip(parts[::2], numbers, strict=True))


def _grouped(pairs: Iterable[tuple[str, str]]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for name, key in pairs:
        found.setdefault(name, []).append(key)
    return MappingProxyType({name: tuple(found[name]) for name in sorted(found, key=natural_order)})
