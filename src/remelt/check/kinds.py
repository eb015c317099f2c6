"""What is told of keys of one kind: their facts, the numbers that differ from key to key, and what has no result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from remelt.archs.facts import KeyFacts
from remelt.check.bound import Step
from remelt.recipe.blocks import BlockWeights

Place = tuple[int, str | None]
Shape = tuple[int, ...]


class Kind(NamedTuple):
    """What the recipe must know of a key: its facts, the numbers of the slots there, whether it is only copied.

    ``facts`` may be None where `Specialiser.asks_facts` is false.
    """

    facts: KeyFacts | None
    numbers: Sequence[float]
    copied: bool


Describe = Callable[[str | None], Kind]


@dataclass(frozen=True)
class Stranded:
    """A result that cannot be computed for a key: what lacks it, or which shapes do not fit."""

    root: int
    key: str | None
    lacking: tuple[str, ...] = ()
    shapes: tuple[str, str] | None = None


class NumberSlot(NamedTuple):
    """A number that differs from key to key: of which argument, at which place of a list, and by which weights.

    ``default`` is the argument's, for keys that no weight speaks for.
    """

    step: Step
    name: str
    place: int | None
    weights: BlockWeights
    default: Any
