"""Experts that are too many for all of their hidden channels to be compared with all others.

Experts are paired first, by numbers that no order of their hidden channels changes: their rows projected on some random
directions, sorted along each. On average these differ by no more than the rows do in their best matching (the sliced
Wasserstein distance). Then the hidden channels of each pair are matched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from remelt.alignment.assignment import Fit, Parts, Solver, Terms
from remelt.alignment.permutation import Permutation, identity
from remelt.alignment.products import free_levels, inner_products, rows_of_pair, width_of_row
from remelt.alignment.weights import Lying, Weights
from remelt.archs.axis_groups import AxisGroup, Window, keys_of
from remelt.core.random import Random

MOST = 12288
"""Hidden channels of all experts of which all pairs of inner products are held at once: 600 MB."""
_DIRECTIONS = 64


def are_many(group: AxisGroup) -> bool:
    """Whether a group is one of experts with more hidden channels than are compared all at once."""
    return group.structure == "experts" and group.size > MOST


def better_experts(
    group: AxisGroup,
    reference: Weights,
    model: Weights,
    lying: Lying,
    permutations: Mapping[str, Permutation],
    current: Permutation,
    solver: Solver,
) -> tuple[Permutation, float]:
    """A permutation of experts and their hidden channels that is at least as good as the current one, and its gain."""
    work = _Experts(group, reference, model, lying, permutations, solver)
    start = {level.name: current.parts.get(level.name, identity(level, group)) for level in group.levels}
    best, found, before = work.settled(start[work.expert], start)
    chosen = work.paired(start[work.expert])
    if not np.array_equal(chosen, start[work.expert]):
        parts, value, _ = work.settled(chosen, start)
        best, found = (parts, value) if value > found else (best, found)
    if found - before <= 1e-6 * abs(before):
        return current, 0.0
    return Permutation(group, best), found - before


class _Experts:
    """One group of experts of both models."""

    def __init__(
        self,
        group: AxisGroup,
        reference: Weights,
        model: Weights,
        lying: Lying,
        permutations: Mapping[str, Permutation],
        solver: Solver,
    ) -> None:
        self.group, self.solver = group, solver
        self.models = reference, model, lying, permutations
        self.expert = group.levels[0].name
        self.inner = [window for window in group.windows if len(free_levels(group, window)) > 1]
        outer = tuple(window for window in group.windows if window not in self.inner)
        beside = AxisGroup(group.name, group.levels[:1], outer)
        none = torch.zeros(group.levels[0].size, group.levels[0].size)
        self.own = inner_products(beside, *self.models).get((self.expert,), none).double()

    def terms(self, here: int, there: int) -> Terms:
        """How well the hidden channels of two experts fit."""
        found: dict[tuple[str, ...], torch.Tensor] = {}
        for window in self.inner:
            levels = free_levels(self.group, window)[1:]
            size = math.prod(self.group.shape(levels))
            if levels not in found:
                found[levels] = torch.zeros(size, size)
            for ours, theirs in rows_of_pair(self.group, window, (here, there), *self.models):
                found[levels].addmm_(ours, theirs.T)
        return {levels: term.view(*self.group.shape(levels) * 2) for levels, term in found.items()}

    def beneath(self, terms: Terms) -> Fit:
        """What is sought below one pair."""
        names = [level for level in self.group.levels[1:] if not level.fixed]
        below = {one.name: tuple(name for name in one.below if name != self.expert) for one in names}
        sizes, cells = {one.name: one.size for one in names}, {one.name: one.cells for one in names}
        return Fit(sizes, below, cells, terms, self.solver)

    def settled(self, experts: NDArray[np.int32], start: Parts) -> tuple[Parts, float, float]:
        """The best hidden channels for a pairing of experts, what both are worth, and what the old ones are."""
        parts = {name: part.copy() for name, part in start.items()}
        parts[self.expert] = experts
        before = total = float(self.own[range(len(self.own)), experts.tolist()].sum())
        for here, there in enumerate(experts):
            fit = self.beneath(self.terms(here, int(there)))
            current = {name: part[here] for name, part in start.items() if name != self.expert}
            found, value = fit.bettered(current)
            before, total = before + fit.value(current), total + value
            for name, row in found.items():
                parts[name][here] = row
        return parts, total, before

    def paired(self, current: NDArray[np.int32]) -> NDArray[np.int32]:
        """The pairing of experts whose hidden channels can come nearest to each other, by sorted projections."""
        count = self.group.levels[0].size
        values = self.own.clone()
        for number, window in enumerate(self.inner):
            ours, theirs = self._projected(window, number, count)
            distances = torch.cdist(ours, theirs).square() / _DIRECTIONS
            values -= distances / 2
        return self.solver.assigned(values, self.group.levels[0].cells, current)

    def _projected(self, window: Window, number: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of all experts on random directions, sorted along each, for both models."""
        width = width_of_row(self.group, window, self.models[0])
        key = keys_of(self.group, window)[0]
        drawn = Random(number, "rebasin", key, 0, width * _DIRECTIONS)
        directions = torch.from_numpy(drawn.normal()).float().view(width, _DIRECTIONS)
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for item in range(count):
            at, sums = 0, [torch.zeros(()), torch.zeros(())]
            for sides in rows_of_pair(self.group, window, (item, item), *self.models):
                step = sides[0].shape[1]
                sums = [one + side @ directions[at : at + step] for one, side in zip(sums, sides, strict=True)]
                at += step
            for rows, one in zip(found, sums, strict=True):
                rows.append(one.double().sort(dim=0).values.reshape(-1))
        return torch.stack(found[0]), torch.stack(found[1])
