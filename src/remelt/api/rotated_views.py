"""Which tensors of a model are rotated, and how: as a permutation file says, or as is found once a merge begins."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from remelt.alignment.files import SavedPermutations
from remelt.alignment.permutation import Rotations
from remelt.alignment.rotated_checkpoint import digest_of
from remelt.alignment.rotations import Turn, rotatable, turns_by_key
from remelt.api.alignment import Alignment
from remelt.archs.axis_groups import AxisGroup, Shapes

_FLOAT = 4
"""Bytes of a number of float32."""


class Turns:
    """How rotations of levels turn the tensors that their windows lie on."""

    def __init__(self, levels: Iterable[tuple[AxisGroup, str]], shapes: Shapes) -> None:
        self.levels, self.shapes = tuple(levels), shapes
        self.keys: Collection[str] = dict.fromkeys(
            window.key for group, name in self.levels for window in group.windows if name in window.levels
        )

    @property
    def is_known(self) -> bool:
        """Always, where a file says it."""
        return True

    def rotations(self) -> Rotations:
        """The rotations, by group and level."""
        raise NotImplementedError

    @cached_property
    def _by_key(self) -> Mapping[str, Sequence[Turn]]:
        return turns_by_key(dict.fromkeys(group for group, _ in self.levels), self.rotations(), self.shapes)

    def of(self, key: str) -> Sequence[Turn]:
        """How the axes of a tensor are turned; none where it stays."""
        return self._by_key.get(key, ())

    def told(self) -> str:
        """The rotations, as a digest."""
        return digest_of(self.rotations())

    @property
    def held(self) -> int:
        """Bytes of the matrices, if every level is rotated."""
        sizes = (math.prod(group.extent(group.by_name[name])) * group.by_name[name].size for group, name in self.levels)
        return sum(sizes) * _FLOAT


class SavedTurns(Turns):
    """What a permutation file rotates."""

    def __init__(self, saved: SavedPermutations) -> None:
        levels = [(group, name) for group in saved.groups for name in saved.rotations.get(group.name, ())]
        super().__init__(levels, saved.shapes)
        self._saved = saved

    def rotations(self) -> Rotations:
        """Those of the file."""
        return self._saved.rotations


class FoundTurns(Turns):
    """What is rotated once two models are matched: found when it is first looked for."""

    def __init__(self, alignment: Alignment) -> None:
        pair = alignment.pair
        levels = [(group, name) for group in pair.matched for name in rotatable(group, pair.shapes)]
        super().__init__(levels, pair.shapes)
        self.alignment = alignment

    @property
    def is_known(self) -> bool:
        """Whether the models were matched."""
        return self.alignment.match is not None

    def rotations(self) -> Rotations:
        """Those that were found; they are found now where nobody asked before."""
        return self.alignment.find().rotations

    def told(self) -> str:
        """That all are rotated that may be: what decides how is told with the permutations."""
        return "all"


class PartTurns:
    """What rotations of a model turn in the parts of an adapter, whose axes are some of the model's."""

    is_known = True

    def __init__(self, turns: SavedTurns, parts: Mapping[str, Mapping[int, tuple[str, int]]]) -> None:
        self.keys: Collection[str] = parts.keys()
        self._turns, self._parts = turns, parts

    def of(self, key: str) -> Sequence[Turn]:
        """How the axes of a part are turned."""
        return [
            replace(turn, axis=axis)
            for axis, (original, wanted) in self._parts[key].items()
            for turn in self._turns.of(original)
            if turn.axis == wanted
        ]

    def told(self) -> str:
        """The model's rotations."""
        return self._turns.told()

    @property
    def held(self) -> int:
        """The model's matrices."""
        return self._turns.held
