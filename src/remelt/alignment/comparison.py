"""Compares two specifications by what they permute, whatever they call it and however they write it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from remelt.alignment.permutation import Parts, Permutation, TensorPlan, is_permutation, random_permutation
from remelt.archs.axis_groups import AxisGroup, Level, Window, keys_of

_SAMPLES = 4
_WHOLE = -1
"""In place of an axis: the tensor itself, which a window that chooses among tensors moves."""

Masks = dict[tuple[str, int], NDArray[np.int32]]
"""For each element of an axis the number of the group that moves it; -1 where none does."""
Plans = Mapping[str, TensorPlan]


def same_groups(first: Iterable[AxisGroup], second: Iterable[AxisGroup]) -> list[str]:
    """How two specifications of the same tensors differ; nothing where they permute the same.

    They are the same if the same elements of the same axes can be moved, and if, for groups that share elements, every
    permutation of one is one of the other. Names, the order of windows, levels that move nothing, and what is fixed do
    not count; groups may be split where nothing ties them. Permutations are sampled, and counted (`AxisGroup.order`).

    >>> one = AxisGroup("g", (Level("channel", 4),), (Window("w", 0, ("channel",)),))
    >>> halves = AxisGroup("h", (Level("channel", 4, cells=(2, 2)),), (Window("w", 0, ("channel",)),))
    >>> same_groups([one], [one]), same_groups([one], [halves])
    ([], ['g of the first and h of the second have 24 and 4 permutations'])
    """
    one, other = [[group for group in groups if not group.is_fixed] for groups in (first, second)]
    sizes = _sizes([*one, *other])
    mine, theirs = _moved(one, sizes), _moved(other, sizes)
    found = list(_moved_by_one(one, mine, theirs, "first"))
    found += _moved_by_one(other, theirs, mine, "second")
    for left, right in _components(one, other, mine, theirs):
        found += _differences(left, right, sizes)
    return found


def _tensors(group: AxisGroup, window: Window) -> Iterator[tuple[str, int, int | None]]:
    """The tensors of a window, the axis that it lies on, and the number of the item where there are several."""
    if window.chooses and not window.is_stacked:
        for item, key in enumerate(keys_of(group, window)):
            yield key, window.axis, item
    else:
        yield window.tensor, window.axis + window.is_stacked, None


def _elements(group: AxisGroup, window: Window) -> NDArray[np.int64]:
    """The elements of each index that lies on a window's axis, those of a run last."""
    return group.positions(window)[..., None] + np.arange(window.run)


def _sizes(groups: Iterable[AxisGroup]) -> dict[tuple[str, int], int]:
    """How far windows reach on each axis."""
    sizes: dict[tuple[str, int], int] = defaultdict(int)
    for group in groups:
        for window in group.windows:
            for key, axis, _ in _tensors(group, window):
                if window.along:
                    sizes[key, axis] = max(sizes[key, axis], int(_elements(group, window).max()) + 1)
                if window.is_stacked:
                    sizes[key, 0] = max(sizes[key, 0], group.by_name[window.levels[0]].size)
    return dict(sizes)


def _is_moved(level: Level) -> NDArray[np.bool_]:
    """Whether each index of a level can be moved."""
    cells = level.cells or (level.size,)
    return np.repeat([not level.fixed and cell > 1 for cell in cells], cells)


def _moved(groups: Sequence[AxisGroup], sizes: Mapping[tuple[str, int], int]) -> Masks:
    found: Masks = {place: np.full(size, -1, np.int32) for place, size in sizes.items()}
    for number, group in enumerate(groups):
        for window in group.windows:
            chosen = window.chooses and bool(_is_moved(group.by_name[window.levels[0]]).any())
            whole = np.zeros(group.shape(window.along), bool)
            for place, name in enumerate(window.along):
                shape = [1] * whole.ndim
                shape[place] = -1
                whole |= _is_moved(group.by_name[name]).reshape(shape)
            elements = _elements(group, window)[whole | chosen].ravel()
            for key, axis, item in _tensors(group, window):
                if window.along:
                    found[key, axis][elements] = number
                if chosen:
                    found.setdefault((key, _WHOLE if item is not None else 0), np.full(1, -1, np.int32))[:] = number
    return found


def _moved_by_one(groups: Sequence[AxisGroup], mine: Masks, theirs: Masks, here: str) -> Iterator[str]:
    nothing = np.full(1, -1, np.int32)
    for (key, axis), mask in mine.items():
        only = (mask >= 0) & (theirs.get((key, axis), nothing) < 0)
        names = sorted({groups[number].name for number in set(mask[only].tolist())})
        if names:
            place = "itself" if axis == _WHOLE else f"axis {axis}"
            count = f"{int(only.sum())} of {mask.size}"
            yield f"{key!r}, {place}: {count} move in the {here} ({', '.join(names)}) only"


def _components(
    one: Sequence[AxisGroup], other: Sequence[AxisGroup], mine: Masks, theirs: Masks
) -> Iterator[tuple[list[AxisGroup], list[AxisGroup]]]:
    """The groups of both that share elements, one lot at a time."""
    lot = list(range(len(one) + len(other)))

    def top(number: int) -> int:
        while lot[number] != number:
            number = lot[number]
        return number

    for place, mask in mine.items():
        beside = theirs.get(place)
        if beside is not None:
            both = (mask >= 0) & (beside >= 0)
            for left, right in {*zip(mask[both].tolist(), beside[both].tolist(), strict=True)}:
                lot[top(left)] = top(right + len(one))
    lots: dict[int, tuple[list[AxisGroup], list[AxisGroup]]] = defaultdict(lambda: ([], []))
    for number, group in enumerate([*one, *other]):
        lots[top(number)][number >= len(one)].append(group)
    yield from lots.values()


def _differences(one: list[AxisGroup], other: list[AxisGroup], sizes: Mapping[tuple[str, int], int]) -> Iterator[str]:
    if not one or not other:
        return  # told as elements that one of them moves
    said = f"{_names(one)} of the first and {_names(other)} of the second"
    orders = [sum(group.order() for group in groups) for groups in (one, other)]
    if abs(orders[0] - orders[1]) > 1e-9 * max(1.0, *orders):
        counts = [f"{np.exp(order):.0f}" if order < 30 else f"e^{order:.3f}" for order in orders]
        yield f"{said} have {counts[0]} and {counts[1]} permutations"
        return
    for left, right in ((one, other), (other, one)):
        generator = np.random.default_rng(0)
        for _ in range(_SAMPLES):
            plans = _plans([random_permutation(group, generator) for group in left], sizes)
            copies = [Permutation(group, parts) for group in right if (parts := _fitted(group, plans)) is not None]
            if len(copies) < len(right) or not _are_same(plans, _plans(copies, sizes)):
                yield f"{said} have as many permutations, but not the same"
                return


def _names(groups: Iterable[AxisGroup]) -> str:
    return " and ".join(group.name for group in groups)


def _plans(permutations: Iterable[Permutation], sizes: Mapping[tuple[str, int], int]) -> Plans:
    """What permutations do to each tensor that they have windows on."""
    windows: dict[str, list[tuple[Permutation, Window]]] = defaultdict(list)
    for one in permutations:
        for window in one.group.windows:
            for key in keys_of(one.group, window):
                windows[key].append((one, window))
    ranks: dict[str, int] = defaultdict(int)
    for key, axis in sizes:
        ranks[key] = max(ranks[key], axis + 1)
    return {
        key: TensorPlan.of(key, tuple(sizes.get((key, axis), 1) for axis in range(ranks[key])), found)
        for key, found in windows.items()
    }


def _sources(plan: TensorPlan, axis: int) -> NDArray[np.int64] | None:
    """The element that comes to each place of an axis: a row, or a row for each item; none where nothing moves."""
    if axis == 0 and plan.items is not None:
        return plan.items
    if plan.within and axis - 1 in plan.within:
        rows = plan.within[axis - 1]
        return rows[0] if (rows == rows[0]).all() else rows
    return plan.axes.get(axis)


def _are_same(one: Plans, other: Plans) -> bool:
    for key in {*one, *other}:
        left, right = (plans.get(key, TensorPlan(key, {})) for plans in (one, other))
        if left.source != right.source:
            return False
        axes = {axis for plan in (left, right) for axis in (0, *plan.axes, *(place + 1 for place in plan.within or {}))}
        for axis in axes:
            rows = [_sources(plan, axis) for plan in (left, right)]
            full = [np.arange(_length(rows)) if row is None else row for row in rows]
            if full[0].shape != full[1].shape or not np.array_equal(full[0], full[1]):
                return False
    return True


def _length(rows: Sequence[NDArray[np.int64] | None]) -> int:
    return max((row.shape[-1] for row in rows if row is not None), default=0)


def _fitted(group: AxisGroup, plans: Plans) -> Parts | None:
    """The parts of a group's permutation that does what plans do, if any can."""
    parts: dict[str, NDArray[np.int32]] = {}
    for window in group.windows:
        places = _places(group, window, plans)
        if places is None:
            return None
        for number, name in enumerate(window.levels):
            level = group.by_name[name]
            index = tuple(slice(None) if one in (*level.below, name) else 0 for one in window.levels)
            kept = [one for one in window.levels if one in (*level.below, name)]
            part = places[number][index].transpose([kept.index(one) for one in (*level.below, name)])
            if not is_permutation(part.astype(np.int32), level):
                return None
            parts.setdefault(name, part.astype(np.int32))
    return parts


def _places(group: AxisGroup, window: Window, plans: Plans) -> list[NDArray[np.int64]] | None:
    """For each level of a window, the index that comes to each place; none where something comes from outside."""
    shape = group.shape(window.levels)
    items = np.zeros(shape, np.int64)
    sources = np.zeros(shape, np.int64)
    elements = _elements(group, window)[..., 0]
    for item, key in enumerate(keys_of(group, window)):
        plan = plans.get(key, TensorPlan(key, {}))
        if window.is_stacked:
            whole = _sources(plan, 0)
            items[:] = (np.arange(shape[0]) if whole is None else whole).reshape(-1, *[1] * (len(shape) - 1))
        elif window.chooses:
            keys = keys_of(group, window)
            if plan.source not in keys:
                return None
            items[item] = keys.index(plan.source)
        if window.along:
            row = _sources(plan, window.axis + window.is_stacked)
            row = np.arange(int(elements.max()) + 1) if row is None else row
            if row.ndim == 2 and not window.is_stacked:
                return None
            found = row[..., elements]
            if window.chooses and not window.is_stacked:
                sources[item] = found
            else:
                sources[:] = found
    lying = group.shape(window.along)
    index = np.full(int(max(sources.max(), elements.max())) + 1, -1)
    index[elements.ravel()] = np.arange(elements.size)
    numbers = index[sources] if window.along else np.zeros(shape, np.int64)
    if (numbers < 0).any():
        return None
    along = list(np.unravel_index(numbers, lying)) if lying else []
    return [items, *along] if window.chooses else along
