"""Makes axis groups of what the labels have become when a graph was followed to its end.

Levels that stand on one axis together, or one below another, are one group. What no window of a group covers is fixed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from remelt.alignment.derivation.labels import Dimensions, Label
from remelt.alignment.derivation.levels import Levels, unused
from remelt.alignment.derivation.stretches import Stretch, places_of
from remelt.archs.axis_groups import STACKED, AxisGroup, Level, Shapes, Window

Parts = Mapping[Label, tuple[Level, ...]]
"""The levels that stand for a label."""


def grouped(axes: Mapping[str, Dimensions], shapes: Shapes) -> tuple[AxisGroup, ...]:
    """The groups of tensors with these axes, those of fixed elements last."""
    levels = Levels(places_of(axes))
    members: dict[int, list[Label]] = defaultdict(list)
    for label in levels.kept:
        members[levels.component(label)].append(label)
    parts = {number: levels.of_group(labels) for number, labels in members.items()}
    windows: dict[int, list[_Placed]] = {number: [] for number in members}
    chosen = {key for (key, axis), found in levels.places.items() for one in found if levels.chooser(key, axis, one)}
    for (key, axis), stretches in levels.places.items():
        for stretch in stretches:
            number = next((levels.component(one) for one in stretch.labels if levels.is_kept(one)), None)
            if number is not None and not (axis == 0 and key in chosen):
                above = levels.chooser(key, axis, stretch)
                windows[number] += _placed(key, axis, stretch, parts[number], above)
    groups = [AxisGroup("", parts[number][0], tuple(_windows(found))) for number, found in windows.items()]
    free = _named([group for group in groups if not group.is_fixed], shapes)
    return (*free, *_fixed(free, shapes))


@dataclass(frozen=True)
class _Placed:
    """A window in the making, with the size of each level on it and the steps of all."""

    key: str
    axis: int
    levels: tuple[str, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    run: int


def _placed(
    key: str, axis: int, stretch: Stretch, parts: tuple[tuple[Level, ...], Parts], above: Label | None
) -> Iterator[_Placed]:
    """The windows of a stretch: what is fixed in it is run through, or counted out."""
    levels, of_label = parts
    run, lying, beside = 1, [], []
    for factor in sorted(stretch.factors, key=lambda one: one.stride):
        if factor.label is not None and factor.label in of_label:
            stride = factor.stride * factor.size
            for level in of_label[factor.label]:
                stride //= level.size
                lying.append((level, stride))
        elif factor.stride == run:
            run *= factor.size
        else:
            beside.append([place * factor.stride for place in range(factor.size)])
    lying.sort(key=lambda one: -one[1])
    names = [level.name for level, _ in lying]
    if any(set(level.below) & set(names[number:]) for number, (level, _) in enumerate(lying)):
        order = [level.name for level in levels]
        lying.sort(key=lambda one: order.index(one[0].name))  # parents first
    names = [level.name for level, _ in lying]
    sizes, strides = tuple(level.size for level, _ in lying), tuple(stride for _, stride in lying)
    if above is not None:
        key, axis, names = key + STACKED, axis - 1, [of_label[above][0].name, *names]
    for steps in product(*beside):
        yield _Placed(key, axis, tuple(names), sizes, strides, stretch.offset + sum(steps), run)


def _windows(placed: Iterable[_Placed]) -> Iterator[Window]:
    """Windows, neighbours joined where they have the same levels."""
    beside: dict[tuple[object, ...], list[_Placed]] = defaultdict(list)
    for one in sorted(placed, key=lambda each: each.offset):
        row = beside[one.key, one.axis, one.levels, one.strides]
        if row and row[-1].offset + row[-1].run == one.offset and not _overlap(row[-1], one.run):
            row[-1] = replace(row[-1], run=row[-1].run + one.run)
        else:
            row.append(one)
    for row in beside.values():
        for one in row:
            packed = tuple(one.run * math.prod(one.sizes[number + 1 :]) for number in range(len(one.sizes)))
            yield Window(
                one.key, one.axis, one.levels, one.offset, one.run, () if one.strides == packed else one.strides
            )


def _overlap(one: _Placed, more: int) -> bool:
    """Whether longer runs would reach the next index."""
    return any(stride < one.run + more for stride in one.strides)


def _named(groups: list[AxisGroup], shapes: Shapes) -> tuple[AxisGroup, ...]:
    """The groups in the order of their first tensors, named after the module that makes their indices."""
    order = {key: number for number, key in enumerate(shapes)}

    def first(group: AxisGroup) -> tuple[bool, int, int, int]:
        return min((one.axis != 0, order[one.tensor], one.axis, one.offset) for one in group.windows)

    used: set[str] = set()
    found = []
    for group in sorted(groups, key=lambda one: first(one)[1:]):
        makers = sorted(group.windows, key=lambda one: (*_makes(one, shapes), order[one.tensor], one.offset))
        module = makers[0].tensor.rpartition(".")[0] or makers[0].tensor
        windows = sorted(group.windows, key=lambda one: (order[one.tensor], one.axis, one.offset))
        found.append(replace(group, name=unused(module, used), windows=tuple(windows)))
    return tuple(found)


def _makes(window: Window, shapes: Shapes) -> tuple[bool, bool]:
    """Whether a window is not on rows of a matrix; and whether it is on no rows."""
    rank = len(shapes[window.tensor]) - window.is_stacked
    return window.axis != 0 or rank < 2, window.axis != 0


def _fixed(groups: Iterable[AxisGroup], shapes: Shapes) -> Iterator[AxisGroup]:
    """Groups of what is in no window, one for each length of a stretch."""
    free = {(key, axis): np.ones(size, bool) for key, shape in shapes.items() for axis, size in enumerate(shape)}
    for group in groups:
        for window in group.windows:
            axis = window.axis + window.is_stacked
            if window.is_stacked:
                free[window.tensor, 0][:] = False
            elements = (group.positions(window)[..., None] + np.arange(window.run)).ravel()
            free[window.tensor, axis][elements] = False
    windows: dict[int, list[Window]] = defaultdict(list)
    for (key, axis), mask in free.items():
        steps = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
        for start, stop in zip(steps[::2].tolist(), steps[1::2].tolist(), strict=True):
            windows[stop - start].append(Window(key, axis, ("channel",), start))
    for size in sorted(windows):
        yield AxisGroup(f"fixed.{size}", (Level("channel", size, fixed=True),), tuple(windows[size]))
