"""Proof, without a product of matrices, that nothing is to be gained by permuting what was trained from a reference.

With ``G`` the inner products of the reference's rows, ``a`` a row and ``d`` what a model differs by there, no
permutation of a group betters the identity where ``G_ii - max_j G_ij + <a_i, d_i> >= |a_i| max_j |d_j|`` for every row,
``j != i``: each row fits its own place best. What stands on ``G`` alone, the margins, is computed once for a reference.
This is said of each group while all others stay: a fixed point of matching, which no proof of joint optimality is.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from remelt.alignment.assignment import stretches
from remelt.alignment.experts import are_many
from remelt.alignment.products import elements_of, free_levels, inner_products, width_of_row
from remelt.alignment.weights import Weights, free_windows, weighed
from remelt.archs.axis_groups import AxisGroup, Window, is_tied, keys_of

_CHUNK = 2**17
"""Elements that are looked at together: what stays in a core's cache."""
_UNIT = 2.0**-24
"""The rounding of float32, by which sums of products may be off for each summand."""
Name = tuple[str, str]
"""A group and the free levels of some of its windows, joined by dots."""


@dataclass(frozen=True)
class Rows:
    """What is kept of the rows that a group has on windows of the same levels."""

    margins: torch.Tensor
    """How much better each row fits itself than any other of its cell, rounding errors taken off; float64."""
    norms: torch.Tensor
    """The length of each row; float64."""


@dataclass(frozen=True)
class Margins:
    """What is kept of a reference, by group and levels, and a digest of each group that it was found for."""

    rows: Mapping[Name, Rows]
    digests: Mapping[str, str]


def find_margins(
    reference: Weights,
    groups: Sequence[AxisGroup],
    progress: Callable[[AxisGroup, int, float], None] | None = None,
) -> Margins:
    """The margins of a reference: as much work as one dense sweep, without assignments.

    ``progress`` hears of each group, how many are left, and how many seconds it took. Experts that are too many to be
    compared all at once have none, and are always matched.
    """
    free = weighed(group for group in groups if not group.is_fixed)
    lying = free_windows(free)
    found: dict[Name, Rows] = {}
    for place, group in enumerate(free):
        begun = time.monotonic()
        if are_many(group):
            continue
        for levels, term in inner_products(group, reference, reference, lying, {}).items():
            size = math.prod(group.shape(levels))
            found[group.name, ".".join(levels)] = _rows(
                term.view(size, size), _cells(group, levels), _columns(group, levels, reference)
            )
        if progress is not None:
            progress(group, len(free) - place - 1, time.monotonic() - begun)
    return Margins(found, {group.name: digest_of(group) for group in free})


def digest_of(group: AxisGroup) -> str:
    """What a group consists of, as a digest: margins of other windows or levels prove nothing."""
    return hashlib.sha256(repr((group.levels, group.windows)).encode("utf-8", "surrogatepass")).hexdigest()


def _rows(products: torch.Tensor, cells: Sequence[int], columns: int) -> Rows:
    squares = products.diagonal().double().clamp(min=0.0).clone()
    norms = squares.sqrt()
    margins = torch.empty_like(squares)
    rounding = columns * _UNIT
    for start, stop in stretches(cells or (len(products),)):
        block = products[start:stop, start:stop].clone()
        block.fill_diagonal_(-torch.inf)
        own = squares[start:stop]
        slack = rounding * (own + norms[start:stop] * norms[start:stop].max())
        margins[start:stop] = own - block.amax(dim=1).double() - slack
    return Rows(margins, norms)


def _cells(group: AxisGroup, levels: Sequence[str]) -> tuple[int, ...]:
    return group.by_name[levels[0]].cells if len(levels) == 1 else ()


def _columns(group: AxisGroup, levels: Sequence[str], weights: Weights) -> int:
    """How many products each inner product is a sum of."""
    return sum(
        width_of_row(group, window, weights) for window in group.windows if free_levels(group, window) == tuple(levels)
    )


def certified(margins: Margins, reference: Weights, model: Weights, groups: Sequence[AxisGroup]) -> tuple[str, ...]:
    """The groups of which margins prove that nothing is gained by permuting them alone: both models are read once."""
    lying = free_windows(groups)
    sums: dict[Name, tuple[torch.Tensor, torch.Tensor]] = {}
    for group in groups:
        for window in group.windows:
            levels = free_levels(group, window)
            if levels:
                size = math.prod(group.shape(levels))
                zeros = torch.zeros(size, dtype=torch.float64)
                sums.setdefault((group.name, ".".join(levels)), (zeros, zeros.clone()))
    for key, windows in lying.items():
        _add(key, windows, reference.tensor(key), model.tensor(key), sums)
    proven = []
    for group in groups:
        names = [name for name in sums if name[0] == group.name]
        known = names and margins.digests.get(group.name) == digest_of(group) and not is_tied(group)
        known = known and all(name in margins.rows for name in names)
        if known and all(_holds(group, name, margins.rows[name], *sums[name]) for name in names):
            proven.append(group.name)
    return tuple(proven)


def _holds(group: AxisGroup, name: Name, rows: Rows, along: torch.Tensor, squares: torch.Tensor) -> bool:
    """Whether every row fits its own place best, of rows that differ by so much."""
    if len(rows.margins) != len(along):
        return False
    lengths = squares.clamp(min=0.0).sqrt()
    for start, stop in stretches(_cells(group, name[1].split(".")) or (len(along),)):
        if stop - start < 2:
            continue
        own = lengths[start:stop]
        largest, second = own.topk(2).values
        others = torch.where(own == largest, second if int((own == largest).sum()) == 1 else largest, largest)
        needed = rows.norms[start:stop] * others * (1 + 1e-6)
        if not bool((rows.margins[start:stop] + along[start:stop] >= needed).all()):
            return False
    return True


def _add(
    key: str,
    windows: Iterable[tuple[AxisGroup, Window]],
    ours: torch.Tensor,
    theirs: torch.Tensor,
    sums: Mapping[Name, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Add what one tensor has to the sums of all rows that it is a part of."""
    items: dict[int | None, list[tuple[AxisGroup, Window]]] = {}
    for group, window in windows:
        for item in range(len(ours)) if window.is_stacked else (None,):
            items.setdefault(item, []).append((group, window))
    for item, some in items.items():
        left, right = (ours, theirs) if item is None else (ours[item], theirs[item])
        axes = sorted({window.axis for _, window in some if window.along})
        whole, found = _sums(left, right, axes)
        for group, window in some:
            levels = free_levels(group, window)
            if not levels:
                continue
            index = elements_of(group, window)
            number = item if item is not None or not window.chooses else keys_of(group, window).index(key)
            for total, one in zip(sums[group.name, ".".join(levels)], found.get(window.axis, whole), strict=True):
                rows = one.view(1) if index is None else one[torch.from_numpy(index)].sum(dim=1)
                start = 0 if number is None else number * len(rows)
                total[start : start + len(rows)] += rows


Sums = tuple[torch.Tensor, torch.Tensor]


def _sums(ours: torch.Tensor, theirs: torch.Tensor, axes: Sequence[int]) -> tuple[Sums, dict[int, Sums]]:
    """The sums of ``a d`` and of ``d d``, whole and for each index of some axes."""
    found = {axis: _zeros(ours.shape[axis]) for axis in axes}
    whole = _zeros(())
    rows = max(_CHUNK // max(ours[0].numel(), 1), 1) if ours.dim() else 1
    for start in range(0, len(ours) if ours.dim() else 1, rows):
        left = (ours[start : start + rows] if ours.dim() else ours).float()
        difference = (theirs[start : start + rows] if ours.dim() else theirs).float() - left
        for place, products in enumerate((left * difference, difference * difference)):
            for axis in axes:
                others = [other for other in range(ours.dim()) if other != axis]
                one = products.sum(dim=others) if others else products
                if axis == 0:
                    found[axis][place][start : start + rows] += one
                else:
                    found[axis][place].add_(one)
            if not axes:
                whole[place].add_(products.sum())
    return whole, found


def _zeros(shape: int | tuple[int, ...]) -> Sums:
    return torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
