"""Permutations of axis groups: what they do to a tensor, their inverses and products, and random ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from remelt.archs.axis_groups import AxisGroup, Level, Positions, Window, keys_of

Parts = Mapping[str, NDArray[np.int32]]


@dataclass(frozen=True)
class Permutation:
    """One permutation of an axis group: for each level the index that comes to each place.

    ``parts`` holds an array for each level, of int32 and of the shape that the group tells (`AxisGroup.extent`): what
    comes to place ``i`` below place ``h`` of the level above is ``parts[level][h, i]``. A level that is left out stays
    as it is.

    >>> from remelt.archs.axis_groups import Window
    >>> group = AxisGroup("g", (Level("head", 2), Level("value", 2, ("head",))), ())
    >>> exchanged = Permutation(group, {"head": np.array([1, 0], np.int32)})
    >>> exchanged.sources(Window("v.weight", 0, ("head", "value"))).tolist()
    [2, 3, 0, 1]
    """

    group: AxisGroup
    parts: Parts

    @property
    def is_identity(self) -> bool:
        """Whether every index stays where it is."""
        return all(
            np.array_equal(part, identity(self.group.by_name[name], self.group)) for name, part in self.parts.items()
        )

    def coordinates(self, levels: Sequence[str]) -> list[NDArray[np.int64]]:
        """For every place of some levels, in order, the index of each that comes there: arrays of one shape."""
        shape = self.group.shape(levels)
        places = dict(zip(levels, np.indices(shape, np.int64, sparse=True), strict=True))
        found = []
        for name in levels:
            part = self.parts.get(name)
            level = self.group.by_name[name]
            source = places[name] if part is None else part[tuple(places[one] for one in (*level.below, name))]
            found.append(np.broadcast_to(source, shape).astype(np.int64))
        return found

    def sources(self, window: Window, item: int | None = None) -> Positions:
        """Which element of a window's axis comes to each that the window has, in the order of `AxisGroup.positions`.

        Of a window that chooses among tensors for the one with that number: elements are those of the tensor that
        comes there (`item_of`).
        """
        group, along = self.group, window.along
        sizes, strides = group.shape(along), group.strides(window)
        coordinates = self.coordinates(window.levels)
        if window.chooses:
            coordinates = [one[item] for one in coordinates[1:]]
        found = np.full(sizes, window.offset, np.int64)
        for source, stride in zip(coordinates, strides, strict=True):
            found += source * stride
        return (found[..., None] + np.arange(window.run)).ravel()

    def item_of(self, window: Window, item: int) -> int:
        """The number of the tensor that comes to the place of another, of a window that chooses among tensors."""
        part = self.parts.get(window.levels[0])
        return item if part is None else int(part[item])

    def inverse(self) -> Permutation:
        """What undoes it.

        >>> group = AxisGroup("g", (Level("channel", 3),), ())
        >>> Permutation(group, {"channel": np.array([1, 2, 0], np.int32)}).inverse().parts["channel"].tolist()
        [2, 0, 1]
        """
        parts: dict[str, NDArray[np.int32]] = {}
        for level in self.group.levels:
            part = self.parts.get(level.name)
            if part is None and not any(name in self.parts for name in level.below):
                continue
            whole = identity(level, self.group) if part is None else part
            undone = np.argsort(whole, axis=-1).astype(np.int32)
            # what lay below place h lies below the place that h came from
            parts[level.name] = self._moved(undone, level, invert=True)
        return Permutation(self.group, parts)

    def after(self, first: Permutation) -> Permutation:
        """The one that does ``first``, then this."""
        parts: dict[str, NDArray[np.int32]] = {}
        for level in self.group.levels:
            mine, theirs = self.parts.get(level.name), first.parts.get(level.name)
            if theirs is None and mine is None:
                continue
            below = identity(level, self.group) if theirs is None else theirs
            moved = self._moved(below, level)
            whole = identity(level, self.group) if mine is None else mine
            parts[level.name] = np.take_along_axis(moved, whole.astype(np.int64), axis=-1).astype(np.int32)
        return Permutation(self.group, parts)

    def _moved(self, part: NDArray[np.int32], level: Level, *, invert: bool = False) -> NDArray[np.int32]:
        """A level's rows at the places that the levels above give them."""
        if not level.below:
            return part
        rows = self.coordinates(level.below)
        if not invert:
            return np.asarray(part[tuple(rows)])
        moved = np.empty_like(part)
        moved[tuple(rows)] = part
        return moved


Permutations = Mapping[str, Permutation]
"""Permutations by the names of their groups; a group that is left out stays as it is."""
Rotations = Mapping[str, Mapping[str, torch.Tensor]]
"""By the names of groups, then of levels: orthogonal matrices, ``[heads, size, size]``.

They come after permutations: row ``i`` of a head's matrix has what each channel, as permuted, adds to channel ``i``.
"""


def of_groups(groups: Iterable[AxisGroup], permutations: Permutations) -> dict[str, Permutation]:
    """The permutations with all windows that the groups have; of a group that has none the identity."""
    none: dict[str, NDArray[np.int32]] = {}
    return {
        group.name: Permutation(group, permutations[group.name].parts if group.name in permutations else none)
        for group in groups
    }


def identity(level: Level, group: AxisGroup) -> NDArray[np.int32]:
    """The permutation of a level that moves nothing."""
    return np.broadcast_to(np.arange(level.size, dtype=np.int32), group.extent(level)).copy()


def is_permutation(part: NDArray[np.int32], level: Level) -> bool:
    """Whether every row permutes the level, within its cells, and not at all where it is fixed."""
    whole = np.broadcast_to(np.arange(level.size, dtype=np.int32), part.shape)
    if level.fixed:
        return bool(np.array_equal(part, whole))
    start = 0
    for cell in level.cells or (level.size,):
        inside = slice(start, start + cell)
        if not np.array_equal(np.sort(part[..., inside], axis=-1), whole[..., inside]):
            return False
        start += cell
    return True


def random_permutation(group: AxisGroup, generator: np.random.Generator) -> Permutation:
    """One of a group's permutations, each as likely as any other."""
    parts = {}
    for level in group.levels:
        if level.fixed:
            continue
        found = identity(level, group)
        start = 0
        for cell in level.cells or (level.size,):
            found[..., start : start + cell] = generator.permuted(found[..., start : start + cell], axis=-1)
            start += cell
        parts[level.name] = found
    return Permutation(group, parts)


def permuted(tensors: Mapping[str, torch.Tensor], permutations: Iterable[Permutation]) -> dict[str, torch.Tensor]:
    """A model with its groups permuted, as new tensors; those that no window lies on are the same."""
    found = dict(tensors)
    chosen: dict[str, list[tuple[Permutation, Window]]] = defaultdict(list)
    for one in permutations:
        for window in one.group.windows:
            for key in keys_of(one.group, window):
                chosen[key].append((one, window))
    for key, windows in chosen.items():
        found[key] = permuted_tensor(key, tensors, windows)
    return found


def permuted_tensor(
    key: str, tensors: Mapping[str, torch.Tensor], windows: Sequence[tuple[Permutation, Window]]
) -> torch.Tensor:
    """What a model with these permutations has under one key; ``windows`` are all that lie on that tensor."""
    plan = TensorPlan.of(key, tuple(tensors[key].shape), windows)
    return plan.applied(tensors[plan.source])


@dataclass(frozen=True)
class TensorPlan:
    """Where the elements of one permuted tensor come from: another tensor's, item by item where it is stacked."""

    source: str
    axes: Mapping[int, Positions]
    """For each permuted axis the element of the source that comes to each place."""
    items: Positions | None = None
    """Of a stacked tensor: the item that comes to each place."""
    within: Mapping[int, Positions] | None = None
    """Of a stacked tensor: for each axis of its items, by item, the element that comes to each place."""

    @staticmethod
    def of(key: str, shape: tuple[int, ...], windows: Sequence[tuple[Permutation, Window]]) -> TensorPlan:
        """That of a tensor of this shape."""
        source, items = key, None
        axes: dict[int, Positions] = {}
        within: dict[int, Positions] = {}
        for one, window in windows:
            if not window.chooses:
                axes.setdefault(window.axis, np.arange(shape[window.axis]))
                _write(axes[window.axis], one, window)
            elif window.is_stacked:
                count = shape[0]
                items = np.array([one.item_of(window, item) for item in range(count)])
                if window.along:
                    size = shape[1 + window.axis]
                    rows = within.setdefault(window.axis, np.tile(np.arange(size), (count, 1)))
                    for item in range(count):
                        _write(rows[item], one, window, item)
            else:
                item = next(place for place, name in enumerate(keys_of(one.group, window)) if name == key)
                source = window.key_of(one.item_of(window, item))
                if window.along:
                    axes.setdefault(window.axis, np.arange(shape[window.axis]))
                    _write(axes[window.axis], one, window, item)
        return TensorPlan(source, axes, items, within or None)

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves inside the tensor."""
        still = [np.array_equal(one, np.arange(len(one))) for one in self.axes.values()]
        if self.items is not None:
            still.append(np.array_equal(self.items, np.arange(len(self.items))))
        still += [bool((rows == np.arange(rows.shape[1])).all()) for rows in (self.within or {}).values()]
        return all(still)

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        """The permuted tensor, of the source's."""
        found = tensor
        if self.items is not None:
            found = found.index_select(0, torch.from_numpy(self.items))
        for axis, rows in (self.within or {}).items():
            chosen = [item.index_select(axis, torch.from_numpy(row)) for item, row in zip(found, rows, strict=True)]
            found = torch.stack(chosen)
        for axis, index in self.axes.items():
            found = found.index_select(axis, torch.from_numpy(index))
        return found


def _write(row: Positions, permutation: Permutation, window: Window, item: int | None = None) -> None:
    """Note in the index of an axis what comes to the elements of one window."""
    starts = permutation.group.positions(window)
    places = (starts[..., None] + np.arange(window.run)).ravel()
    row[places] = permutation.sources(window, item)
