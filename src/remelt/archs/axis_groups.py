"""Axis groups: which axes of which tensors must be permuted alike for a network to compute what it did before.

A group is an index set, told as a tree of levels, and the windows that it has on tensors' axes. Channels that are read
and written pointwise are one level. Attention has heads, and below each head a set of query and key channels and one of
values; a GroupNorm has groups, and channels below each. A level has a permutation of its own for every index of those
that it stands below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ITEM = "{}"
"""In the key of a window: the number of the item that its first level chooses, of tensors that differ in it alone."""
STACKED = "[{}]"
"""At the end of a key: the item is one of the tensor's first axis."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor by its key."""
Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Level:
    """One index set of a group: ``size`` indices, permuted apart for each index of the levels that it is ``below``.

    ``cells`` are the sizes of neighbouring stretches that nothing leaves; none stands for a single one. A ``fixed``
    level is not permuted at all.
    """

    name: str
    size: int
    below: tuple[str, ...] = ()
    cells: tuple[int, ...] = ()
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """Where the indices of some levels of a group lie on an axis of a tensor.

    Index 0 lies at ``offset``; the last of ``levels`` counts fastest. Each index takes ``run`` neighbouring elements.
    ``strides`` are the steps of the levels where they are not packed one into another, in elements.

    A key that holds ``{}`` stands for as many tensors as the first of its levels has indices; one that ends in ``[{}]``
    for the items of a tensor's first axis. The axis is that of an item, and the other levels lie on it.
    """

    key: str
    axis: int
    levels: tuple[str, ...]
    offset: int = 0
    run: int = 1
    strides: tuple[int, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether its first level chooses among tensors, or among the items of one."""
        return ITEM in self.key

    @property
    def is_stacked(self) -> bool:
        """Whether the items are those of one tensor's first axis."""
        return self.key.endswith(STACKED)

    @property
    def tensor(self) -> str:
        """The key of the tensor that it lies on; with ``{}`` where there are several."""
        return self.key.removesuffix(STACKED)

    def key_of(self, item: int) -> str:
        """The key of one item's tensor."""
        return self.tensor.replace(ITEM, str(item))

    @property
    def along(self) -> tuple[str, ...]:
        """The levels that lie on the axis."""
        return self.levels[1:] if self.chooses else self.levels


@dataclass(frozen=True)
class AxisGroup:
    """Windows that are permuted alike, by a permutation that keeps the tree of ``levels``.

    ``crosses`` names two components where their tensors are tied by it: it is left fixed unless it is asked for.

    >>> levels = (Level("head", 2), Level("value", 3, below=("head",)))
    >>> AxisGroup("attn.v", levels, (Window("v.weight", 0, ("head", "value")),)).size
    6
    """

    name: str
    levels: tuple[Level, ...]
    windows: tuple[Window, ...]
    crosses: str = ""
    by_name: Mapping[str, Level] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {level.name: level for level in self.levels})

    @property
    def structure(self) -> str:
        """What it is called: ``free``, ``cells``, ``groups``, ``heads``, ``experts`` or ``fixed``."""
        if self.is_fixed:
            return "fixed"
        if len(self.levels) == 1:
            return "cells" if self.levels[0].cells else "free"
        first = self.levels[0].name
        return {"group": "groups", "expert": "experts"}.get(first, "heads")

    @property
    def is_fixed(self) -> bool:
        """Whether nothing of it may be permuted."""
        return all(level.fixed or level.size == 1 or set(level.cells) == {1} for level in self.levels)

    @property
    def size(self) -> int:
        """Indices of its largest window."""
        return max((math.prod(self.shape(window.levels)) for window in self.windows), default=0)

    def shape(self, levels: Iterable[str]) -> tuple[int, ...]:
        """The sizes of some levels."""
        return tuple(self.by_name[name].size for name in levels)

    def extent(self, level: Level) -> tuple[int, ...]:
        """The shape of a level's permutations: one row for each index of what it is below."""
        return (*self.shape(level.below), level.size)

    def strides(self, window: Window) -> tuple[int, ...]:
        """The step of each level that lies on a window's axis, in elements."""
        if window.strides:
            return window.strides
        sizes = self.shape(window.along)
        return tuple(window.run * math.prod(sizes[place + 1 :]) for place in range(len(sizes)))

    def positions(self, window: Window) -> Positions:
        """Where on a window's axis each index begins, with one dimension for each level that lies on it.

        >>> group = AxisGroup("g", (Level("head", 2), Level("qk", 2, ("head",))), ())
        >>> group.positions(Window("fused.weight", 0, ("head", "qk"), offset=2, strides=(6, 1))).tolist()
        [[2, 3], [8, 9]]
        """
        sizes = self.shape(window.along)
        found = np.full(sizes, window.offset, np.int64)
        for place, (size, stride) in enumerate(zip(sizes, self.strides(window), strict=True)):
            shape = [1] * len(sizes)
            shape[place] = size
            found += (np.arange(size, dtype=np.int64) * stride).reshape(shape)
        return found

    def order(self) -> float:
        """How many permutations it has, as a natural logarithm."""
        total = 0.0
        for level in self.levels:
            if not level.fixed:
                cells = level.cells or (level.size,)
                total += math.prod(self.shape(level.below)) * sum(math.lgamma(cell + 1) for cell in cells)
        return total


def keys_of(group: AxisGroup, window: Window) -> tuple[str, ...]:
    """The keys of the tensors that a window lies on, the item's number counting where it chooses among tensors."""
    if not window.chooses or window.is_stacked:
        return (window.tensor,)
    return tuple(window.key_of(item) for item in range(group.by_name[window.levels[0]].size))


def windows_by_key(groups: Iterable[AxisGroup]) -> dict[str, list[tuple[AxisGroup, Window]]]:
    """The tensors that groups lie on, with their windows there."""
    found: dict[str, list[tuple[AxisGroup, Window]]] = {}
    for group in groups:
        for window in group.windows:
            for key in keys_of(group, window):
                found.setdefault(key, []).append((group, window))
    return found


def is_tied(group: AxisGroup) -> bool:
    """Whether a group lies on several axes of one tensor: what it gains there is no sum over its rows."""
    found = windows_by_key([group]).values()
    return any(len({window.axis for _, window in windows}) > 1 for windows in found)


def faults(groups: Iterable[AxisGroup], shapes: Shapes) -> Iterator[str]:
    """What is wrong with a specification of a model with tensors of these shapes; nothing where it is sound.

    Every element of every axis is in one window (of fixed groups, too), windows are within their axes and do not
    overlap, and a level's parents stand before it wherever it lies.

    >>> list(faults([AxisGroup("g", (Level("channel", 3),), (Window("w", 0, ("channel",)),))], {"w": (4,)}))
    ["g: 'w' has 1 element of axis 0 that no group has"]
    """
    covered: dict[tuple[str, int], NDArray[np.int32]] = {}
    stacked: set[str] = set()
    names: set[str] = set()
    owners: dict[str, str] = {}
    for group in groups:
        if group.name in names:
            yield f"two groups are named {group.name}"
        names.add(group.name)
        yield from (f"{group.name}: {fault}" for fault in _faults_of_levels(group))
        for window in group.windows:
            found = list(_faults_of_window(group, window, shapes))
            yield from (f"{group.name}: {fault}" for fault in found)
            if not found:
                for key in _cover(group, window, shapes, covered, stacked):
                    owners.setdefault(key, group.name)
    for (key, axis), counts in covered.items():
        twice = int((counts > 1).sum())
        if twice:
            yield f"{owners[key]}: {key!r} has {_elements(twice)} of axis {axis} that several windows have"
    for key, shape in shapes.items():
        for axis in range(len(shape)):
            found_counts = covered.get((key, axis))
            lacking = shape[axis] if found_counts is None else int((found_counts == 0).sum())
            matters = axis < (3 if key in stacked else 2) or found_counts is not None  # a kernel's axes do not
            if lacking and matters and shape[axis] > 1:
                owner = f"{owners[key]}: " if key in owners else ""
                yield f"{owner}{key!r} has {_elements(lacking)} of axis {axis} that no group has"


def _elements(count: int) -> str:
    return f"{count} element" + ("s" if count != 1 else "")


def _faults_of_levels(group: AxisGroup) -> Iterator[str]:
    seen: set[str] = set()
    for level in group.levels:
        if level.name in seen:
            yield f"two levels are named {level.name}"
        if not set(level.below) <= seen:
            yield f"level {level.name} is below {', '.join(level.below)}, which do not all stand before it"
        if level.cells and sum(level.cells) != level.size:
            yield f"the cells of level {level.name} have {sum(level.cells)} indices, but it has {level.size}"
        seen.add(level.name)


def _faults_of_window(group: AxisGroup, window: Window, shapes: Shapes) -> Iterator[str]:
    strange = [name for name in window.levels if name not in group.by_name]
    if strange:
        yield f"the window on {window.key!r} has a level {strange[0]} that the group has not"
        return
    for place, name in enumerate(window.levels):
        above = [one for one in group.by_name[name].below if one not in window.levels[:place]]
        if above:
            yield f"the window on {window.key!r} has level {name} without {above[0]} before it"
    if window.strides and len(window.strides) != len(window.along):
        yield f"the window on {window.key!r} has {len(window.strides)} strides for {len(window.along)} levels"
        return
    positions = group.positions(window)
    for key in keys_of(group, window):
        shape = shapes.get(key)
        if shape is None:
            yield f"{key!r} is not there"
            continue
        if window.is_stacked:
            items = group.by_name[window.levels[0]].size
            if shape[0] != items:
                yield f"{key!r} has {shape[0]} items, but {window.levels[0]} has {items}"
            shape = shape[1:]
        if not window.along:
            continue
        if not 0 <= window.axis < len(shape):
            yield f"{key!r} is {list(shapes[key])}: it has no axis {window.axis}"
        elif positions.size and int(positions.max()) + window.run > shape[window.axis]:
            needed = int(positions.max()) + window.run
            yield f"{key!r} has {shape[window.axis]} elements on axis {window.axis}, but the window ends at {needed}"


def _cover(
    group: AxisGroup,
    window: Window,
    shapes: Shapes,
    covered: dict[tuple[str, int], NDArray[np.int32]],
    stacked: set[str],
) -> Iterator[str]:
    """Count the elements of a window; the keys that it lies on."""
    elements = (group.positions(window)[..., None] + np.arange(window.run)).ravel()
    for key in keys_of(group, window):
        yield key
        shape = shapes[key]
        if window.is_stacked:
            covered.setdefault((key, 0), np.zeros(shape[0], np.int32))[:] = 1  # windows of its items may be several
            stacked.add(key)
        if window.along:
            axis = window.axis + window.is_stacked
            counts = covered.setdefault((key, axis), np.zeros(shape[axis], np.int32))
            np.add.at(counts, elements, 1)
