"""Block weights: one number for each key, said by key pattern, block, layer class, component, depth, or plainly."""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remelt.errors import RecipeError

if TYPE_CHECKING:
    from remelt.archs.facts import KeyFacts, Layout


@dataclass(frozen=True)
class Search:
    """A hole for a number between ``low`` and ``high``, filled by a study."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise RecipeError(f"search needs two finite numbers, low below high, but got {self.low} and {self.high}")


Weight = float | Search

KEYS, BLOCKS, CLASSES, COMPONENTS = "keys", "blocks", "classes", "components"
DEPTH, PRESET = "depth", "preset"
RANKS = {KEYS: 0, BLOCKS: 1, DEPTH: 1, PRESET: 1, CLASSES: 2, COMPONENTS: 3}
"""The more specific kind wins: key pattern, block, layer class, component, plain number."""


@dataclass(frozen=True)
class Rule:
    """One kind of selector with its values: names to weights, or a list along the depth of a stack or a preset.

    A key's pattern may have weights along the depth. ``optional`` patterns need not match any key.
    """

    kind: str
    named: tuple[tuple[str, Weight | BlockWeights], ...] = ()
    listed: tuple[Weight, ...] = ()
    stack: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class BlockWeights:
    """Rules that give one number for each key, the more specific winning, at equal rank the left one.

    ``default`` is the plain number at the end; without it, a key that no rule speaks for takes the argument's default.

    >>> blocks(IN00=0.2, M00=0.8) | 0.33
    blocks(IN00=0.2, M00=0.8) | 0.33
    """

    rules: tuple[Rule, ...] = ()
    default: Weight | None = None

    def __or__(self, other: BlockWeights | Search | float) -> BlockWeights:
        if isinstance(other, BlockWeights):
            default = self.default if self.default is not None else other.default
            return BlockWeights(self.rules + other.rules, default)
        if isinstance(other, Search) or (isinstance(other, (int, float)) and not isinstance(other, bool)):
            return BlockWeights(self.rules, self.default if self.default is not None else _weight(other, "a default"))
        return NotImplemented

    def __repr__(self) -> str:
        parts = [render_rule(rule) for rule in self.rules]
        if self.default is not None:
            parts.append(render_weight(self.default))
        return " | ".join(parts)

    def searches(self) -> Iterator[Search]:
        """The open numbers among the weights, in the order they were written."""
        return (number for number in self.numbers() if isinstance(number, Search))

    def numbers(self) -> Iterator[float | Search]:
        """All numbers among the weights, open ones too, in the order they were written."""
        for rule in self.rules:
            for _, weight in rule.named:
                if isinstance(weight, BlockWeights):
                    yield from weight.numbers()
                else:
                    yield weight
            yield from rule.listed
        if self.default is not None:
            yield self.default

    def names(self, kind: str) -> Iterator[str]:
        """The names written under one kind of selector."""
        for rule in self.rules:
            if rule.kind == kind:
                yield from (name for name, _ in rule.named)

    def resolve(self, facts: KeyFacts, layout: Layout) -> Weight | None:
        """The number of one key, or None where nothing speaks for it."""
        best: tuple[tuple[int, int], Weight] | None = None
        for rule in self.rules:
            found = _match(rule, facts, layout)
            if found is None:
                continue
            level, weight = found
            rank = (RANKS[rule.kind], level)
            if best is None or rank < best[0]:
                best = rank, weight
        return self.default if best is None else best[1]


def _match(rule: Rule, facts: KeyFacts, layout: Layout) -> tuple[int, Weight] | None:
    """The level within the rule's rank (0 is the most specific) and the weight, where the rule speaks for the key."""
    if rule.kind == KEYS:
        matching = (weight for glob, weight in rule.named if _glob(glob).match(facts.key))
        known = (w.resolve(facts, layout) if isinstance(w, BlockWeights) else w for w in matching)
        return next(((0, weight) for weight in known if weight is not None), None)
    named = plain_weights(rule)
    if rule.kind == BLOCKS:
        found = [
            (_level(name, facts), weight) for name, weight in named if name in facts.blocks or name in facts.groups
        ]
        return min(found, key=lambda pair: pair[0]) if found else None
    if rule.kind == CLASSES:
        return next(((0, weight) for name, weight in named if layout.matches_class(facts, name)), None)
    if rule.kind == COMPONENTS:
        return next(((0, weight) for name, weight in named if layout.is_component(facts, name)), None)
    if rule.kind == DEPTH:
        if facts.stack is None or not (rule.stack is None or _names_stack(rule.stack, facts.stack)):
            return None
        return 0, interpolate(rule.listed, facts.index, facts.count)
    names = layout.preset_names(len(rule.listed))
    found = [
        (_level(name, facts), weight)
        for name, weight in zip(names, rule.listed, strict=False)
        if name in facts.blocks or name in facts.groups
    ]
    return min(found, key=lambda pair: pair[0]) if found else None


def plain_weights(rule: Rule) -> tuple[tuple[str, Weight], ...]:
    """The names of a rule with their weights, where these are numbers: of all rules but those of keys."""
    return rule.named  # type: ignore[return-value]


def _level(name: str, facts: KeyFacts) -> int:
    return 0 if name in facts.blocks else 1


def _names_stack(name: str, stack: str) -> bool:
    return stack == name or stack.endswith("." + name)


@functools.lru_cache(maxsize=4096)
def literal_glob(name: str) -> str:
    """The glob that matches this name alone."""
    return "".join(f"[{char}]" if char in "[*?" else char for char in name)


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def interpolate(values: Sequence[Weight], index: int, count: int) -> Weight:
    """The value at ``index`` of ``count`` along the piecewise linear curve through ``values``.

    >>> interpolate((0.0, 0.5, 1.0), 1, 5)
    0.25
    """
    if len(values) == 1 or count <= 1:
        return values[0]
    place = index * (len(values) - 1) / (count - 1)
    left = min(int(place), len(values) - 2)
    share = place - left
    low, high = values[left], values[left + 1]
    if isinstance(low, Search) or isinstance(high, Search):
        raise RecipeError("a depth curve with search(...) in it is still open: a study fills it before a merge")
    return low if share == 0 else high if share == 1 else low + (high - low) * share


def blocks(named: Mapping[str, Weight] | str | None = None, /, **weights: Weight) -> BlockWeights:
    """Weights by block name, or by one of the community's preset strings of comma-separated numbers.

    >>> blocks({"double_blocks.3": 0.2})
    blocks({'double_blocks.3': 0.2})
    """
    if isinstance(named, str):
        if weights:
            raise RecipeError("blocks takes a preset string or names, not both")
        return BlockWeights((Rule(PRESET, listed=_preset(named)),))
    return BlockWeights((Rule(BLOCKS, named=_named("blocks", named, weights)),))


def components(named: Mapping[str, Weight] | None = None, /, **weights: Weight) -> BlockWeights:
    """Weights by component, such as ``unet``, ``txt`` or ``vae``."""
    return BlockWeights((Rule(COMPONENTS, named=_named("components", named, weights)),))


def classes(named: Mapping[str, Weight] | None = None, /, **weights: Weight) -> BlockWeights:
    """Weights by kind of layer, such as ``attn1.to_q``, ``mlp`` or ``norm``."""
    return BlockWeights((Rule(CLASSES, named=_named("classes", named, weights)),))


def keys(named: Mapping[str, Weight | BlockWeights], *, optional: bool = False) -> BlockWeights:
    """Weights by glob over whole key names, such as ``*.attn2.*``: numbers, or `depth` with a number after it.

    Each pattern must match a key, unless they are ``optional``.

    >>> keys({"*.attn2.*": depth([0, 1]) | 0.5})
    keys({'*.attn2.*': depth([0.0, 1.0]) | 0.5})
    """
    if not isinstance(optional, bool):
        raise RecipeError(f"keys needs True or False for 'optional', but got {optional!r}")
    return BlockWeights((Rule(KEYS, named=_named("keys", named, {}), optional=optional),))


def depth(values: Sequence[Weight], stack: str | None = None) -> BlockWeights:
    """Weights along the depth of every stack, or of the one named, interpolated between the values."""
    if not isinstance(values, (list, tuple)) or not values:
        raise RecipeError("depth needs a list of numbers, as in depth([0, 0.5, 1])")
    listed = tuple(_weight(value, "depth") for value in values)
    return BlockWeights((Rule(DEPTH, listed=listed, stack=stack),))


def search(low: float, high: float) -> Search:
    """A hole for a number between two, filled by a study."""
    return Search(float(low), float(high))


MAKERS: dict[str, Callable[..., BlockWeights]] = {
    "blocks": blocks,
    "components": components,
    "classes": classes,
    "keys": keys,
    "depth": depth,
}
"""What a recipe's text may call to write block weights."""


def _named(
    kind: str, named: Mapping[str, Weight | BlockWeights] | None, weights: Mapping[str, Weight]
) -> tuple[tuple[str, Weight | BlockWeights], ...]:
    if named is not None and not isinstance(named, Mapping):
        raise RecipeError(
            f"{kind} needs names with numbers, but got {named!r}", hint=f"{kind}(NAME=0.5) or {kind}({{'NAME': 0.5}})"
        )
    merged = {**(named or {}), **weights}
    if not merged:
        raise RecipeError(f"{kind} needs at least one name with a number")
    for name in merged:
        if not isinstance(name, str):
            raise RecipeError(f"{kind} needs names that are text, but got {name!r}")
    return tuple(
        (name, weight if kind == KEYS and is_curve(weight) else _weight(weight, f"{kind}: {name}"))
        for name, weight in merged.items()
    )


def is_curve(weight: object) -> bool:
    """Whether a weight is one along the depth, with or without a number for what stands in no stack."""
    return isinstance(weight, BlockWeights) and bool(weight.rules) and all(r.kind == DEPTH for r in weight.rules)


def _weight(value: object, place: str) -> Weight:
    if isinstance(value, Search):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(f"{place} needs a finite number, but got {value!r}")
    return float(value)


def _preset(text: str) -> tuple[Weight, ...]:
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(_weight(float(part), "a preset string"))
        except ValueError:
            raise RecipeError(
                f"a preset string is comma-separated numbers, but {part.strip()!r} is none",
                hint="25 numbers are IN00..IN11, M00, OUT00..OUT11; 26 begin with BASE",
            ) from None
    return tuple(numbers)


def render_weight(weight: Weight) -> str:
    """A weight as a recipe writes it."""
    return f"search({weight.low!r}, {weight.high!r})" if isinstance(weight, Search) else repr(weight)


def render_rule(rule: Rule) -> str:
    """A rule as a recipe writes it."""
    if rule.kind == PRESET:
        return f'blocks("{",".join(render_weight(weight) for weight in rule.listed)}")'
    if rule.kind == DEPTH:
        stack = "" if rule.stack is None else f", stack={rule.stack!r}"
        return f"depth([{', '.join(render_weight(weight) for weight in rule.listed)}]{stack})"
    if rule.kind != KEYS and all(name.isidentifier() for name, _ in rule.named):
        return f"{rule.kind}({', '.join(f'{name}={render_weight(weight)}' for name, weight in plain_weights(rule))})"
    named = ", ".join(
        f"{name!r}: {weight!r}" if isinstance(weight, BlockWeights) else f"{name!r}: {render_weight(weight)}"
        for name, weight in rule.named
    )
    return f"{rule.kind}({{{named}}}{', optional=True' if rule.optional else ''})"
