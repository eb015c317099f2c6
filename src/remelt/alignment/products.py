"""Inner products of a group's indices in two models: multiplied in float32, a chunk of the tensors at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from remelt.alignment.assignment import stretches
from remelt.alignment.permutation import Permutation, TensorPlan
from remelt.alignment.weights import Lying, Weights
from remelt.archs.axis_groups import AxisGroup, Window, keys_of

_CHUNK = 2**23
"""Elements of a model that are multiplied at a time."""
Index = NDArray[np.int64]


def free_levels(group: AxisGroup, window: Window) -> tuple[str, ...]:
    """The levels of a window that are permuted; over fixed ones products are summed."""
    return tuple(name for name in window.levels if not group.by_name[name].fixed)


def inner_products(
    group: AxisGroup, reference: Weights, model: Weights, lying: Lying, permutations: Mapping[str, Permutation]
) -> dict[tuple[str, ...], torch.Tensor]:
    """How well each index of a group in the reference fits each in the model, whose other groups are permuted.

    By the free levels of windows: tensors of float32, of the shape of the levels for the reference, then again for the
    model, whose indices are those of its own tensors. Outside of a level's cells they are zero.
    """
    found: dict[tuple[str, ...], torch.Tensor] = {}
    for window in group.windows:
        levels = free_levels(group, window)
        if not levels:
            continue
        size = math.prod(group.shape(levels))
        cells = group.by_name[levels[0]].cells if len(levels) == 1 else ()
        for ours, theirs in rows_of_both(group, window, reference, model, lying, permutations):
            if levels not in found and not cells:
                found[levels] = ours @ theirs.T  # large matrices are not filled with zeros first
                continue
            if levels not in found:
                found[levels] = torch.zeros(size, size)
            for start, stop in stretches(cells or (size,)):
                found[levels][start:stop, start:stop].addmm_(ours[start:stop], theirs[start:stop].T)
    return {levels: term.view(*group.shape(levels) * 2) for levels, term in found.items()}


def rows_of_both(
    group: AxisGroup,
    window: Window,
    reference: Weights,
    model: Weights,
    lying: Lying,
    permutations: Mapping[str, Permutation],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What both models have at the indices of a window, as rows of float32: chunks of their columns."""
    index = elements_of(group, window)
    if not window.chooses:
        theirs, axes = permuted_around(window.key, window, group, model, lying, permutations)
        yield from _chunks(reference.tensor(window.key), theirs, axes, window.axis, index)
        return
    count = group.by_name[window.levels[0]].size
    items = [rows_of_pair(group, window, (one, one), reference, model, lying, permutations) for one in range(count)]
    for chunks in zip(*items, strict=True):
        yield torch.cat([left for left, _ in chunks]), torch.cat([right for _, right in chunks])


def rows_of_pair(
    group: AxisGroup,
    window: Window,
    pair: tuple[int, int],
    reference: Weights,
    model: Weights,
    lying: Lying,
    permutations: Mapping[str, Permutation],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of one item of the reference and of one of the model, of a window that chooses among them."""
    ours = reference.tensor(window.key_of(pair[0]))
    theirs, axes = permuted_around(window.key_of(pair[1]), window, group, model, lying, permutations)
    if window.is_stacked:
        ours, theirs = ours[pair[0]], theirs[pair[1]]
        axes = {axis - 1: one for axis, one in axes.items() if axis}
    yield from _chunks(ours, theirs, axes, window.axis, elements_of(group, window))


def permuted_around(
    key: str,
    window: Window | None,
    group: AxisGroup | None,
    model: Weights,
    lying: Lying,
    permutations: Mapping[str, Permutation],
) -> tuple[torch.Tensor, dict[int, Index]]:
    """A tensor of the model and how its axes are permuted, but for what a window of a group does; all with None."""
    others = []
    for other, one in lying.get(key, ()):
        if other.name not in permutations:
            continue
        own = group is not None and window is not None and other.name == group.name
        if own and (one.chooses or window.chooses or one.axis == window.axis):  # type: ignore[union-attr]
            continue
        others.append((permutations[other.name], one))
    if not others:
        return model.tensor(key), {}
    plan = TensorPlan.of(key, tuple(model.shapes[key]), others)
    if plan.items is not None or plan.within is not None:
        return plan.applied(model.tensor(plan.source)), {}
    axes = {axis: one for axis, one in plan.axes.items() if not np.array_equal(one, np.arange(len(one)))}
    return model.tensor(plan.source), axes


def elements_of(group: AxisGroup, window: Window) -> Index | None:
    """The elements of each row, one row for each index of the free levels; None where a whole item is one."""
    along = window.along
    if not along:
        return None
    fixed = [place for place, name in enumerate(along) if group.by_name[name].fixed]
    free = [place for place, name in enumerate(along) if place not in fixed]
    positions = group.positions(window).transpose(*free, *fixed)
    rows = math.prod(group.shape(along[place] for place in free))
    return (positions.reshape(rows, -1, 1) + np.arange(window.run)).reshape(rows, -1)


def _chunks(
    ours: torch.Tensor, theirs: torch.Tensor, axes: Mapping[int, Index], axis: int, index: Index | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of two tensors of which one's axes are permuted, some of their columns at a time."""
    if index is None:
        for place, one in axes.items():
            theirs = theirs.index_select(place, torch.from_numpy(one))
        yield ours.reshape(1, -1).float(), theirs.reshape(1, -1).float()
        return
    others = [place for place in range(ours.dim()) if place != axis]
    if not others:
        yield _matrix(ours, 0, index), _matrix(theirs, 0, index)
        return
    cut = max(others, key=lambda place: ours.shape[place])
    step = max(_CHUNK * ours.shape[cut] // max(index.size * math.prod(ours.shape[one] for one in others), 1), 1)
    for start in range(0, ours.shape[cut], step):
        length = min(step, ours.shape[cut] - start)
        left, right = ours.narrow(cut, start, length), theirs
        if cut in axes:
            right = right.index_select(cut, torch.from_numpy(axes[cut][start : start + length]))
        else:
            right = right.narrow(cut, start, length)
        for place in others:
            if place in axes and place != cut:
                right = right.index_select(place, torch.from_numpy(axes[place]))
        yield _matrix(left, axis, index), _matrix(right, axis, index)


def width_of_row(group: AxisGroup, window: Window, weights: Weights) -> int:
    """How many elements each row of a window has."""
    index, shape = elements_of(group, window), weights.shapes[keys_of(group, window)[0]]
    shape = shape[1:] if window.is_stacked else shape
    if index is None:
        return math.prod(shape)
    return int(index.shape[1]) * math.prod(shape) // max(shape[window.axis], 1)


def rows_of(group: AxisGroup, window: Window, weights: Weights, most: int) -> Iterator[torch.Tensor]:
    """The rows of one model at the indices of a window, whole, in chunks of at most so many elements."""
    index = elements_of(group, window)
    items = group.by_name[window.levels[0]].size if window.chooses else 1
    for item in range(items):
        tensor = weights.tensor(window.key_of(item) if window.chooses else window.key)
        tensor = tensor[item] if window.is_stacked else tensor
        if index is None:
            yield tensor.reshape(1, -1).float()
            continue
        step = max(most * len(index) * tensor.shape[window.axis] // max(index.size * tensor.numel(), 1), 1)
        for start in range(0, len(index), step):
            yield _matrix(tensor, window.axis, index[start : start + step])


def _matrix(tensor: torch.Tensor, axis: int, index: Index) -> torch.Tensor:
    """The elements of an axis as rows of float32, together with all that the other axes have there."""
    flat = index.reshape(-1)
    if len(flat) and np.array_equal(flat, np.arange(flat[0], flat[0] + len(flat))):
        chosen = tensor.narrow(axis, int(flat[0]), len(flat))
    else:
        chosen = tensor.index_select(axis, torch.from_numpy(flat))
    return chosen.movedim(axis, 0).float().reshape(len(index), -1)


def agreement(
    reference: Weights, model: Weights, lying: Lying, permutations: Mapping[str, Permutation], keys: Sequence[str]
) -> float:
    """The sum of the inner products of both models' tensors, the model permuted."""
    return sum(float(torch.dot(*one)) for one in _sides(reference, model, lying, permutations, keys))


def squared_norms(reference: Weights, model: Weights, keys: Sequence[str]) -> tuple[float, float, float]:
    """The sums of the squares of both models' tensors, and of their products."""
    found = [0.0, 0.0, 0.0]
    for left, right in _sides(reference, model, {}, {}, keys):
        for place, (one, other) in enumerate(((left, left), (right, right), (left, right))):
            found[place] += float(torch.dot(one, other))
    return found[0], found[1], found[2]


def _sides(
    reference: Weights, model: Weights, lying: Lying, permutations: Mapping[str, Permutation], keys: Sequence[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both models' tensors, flat and in chunks of float32, the model permuted."""
    for key in keys:
        theirs, axes = permuted_around(key, None, None, model, lying, permutations)
        ours = reference.tensor(key)
        if not ours.dim():
            ours, theirs = ours.reshape(1), theirs.reshape(1)
        step = max(_CHUNK // 8 // max(ours[0].numel(), 1), 1)
        for start in range(0, len(ours), step):
            stop = min(start + step, len(ours))
            right = theirs.index_select(0, torch.from_numpy(axes[0][start:stop])) if 0 in axes else theirs[start:stop]
            for place, one in axes.items():
                right = right.index_select(place, torch.from_numpy(one)) if place else right
            yield ours[start:stop].float().reshape(-1), right.float().reshape(-1)
