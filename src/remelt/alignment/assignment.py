"""The best permutation of one group, from the inner products of its indices: assignments of assignments.

A `Fit` holds, for each set of levels that windows lie on, how well every index of the one model fits every index of
the other. One level is a linear assignment. Where levels stand below a first one, the best assignment below each pair
of its indices gives the pair's value. Levels beside each other that meet in a window are bettered in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remelt.alignment.permutation import Permutation, identity
from remelt.archs.axis_groups import AxisGroup
from remelt.errors import MissingExtraError

Terms = Mapping[tuple[str, ...], torch.Tensor]
"""By the levels of windows: inner products, of the shape of the levels for the reference, then again for the model."""
Parts = dict[str, NDArray[np.int32]]
_MOST_TURNS = 32
"""Turns that levels beside each other take; they end by themselves where none gains."""


@dataclass(frozen=True)
class Fit:
    """What is sought: permutations of levels that make the sum of the chosen inner products the largest."""

    sizes: Mapping[str, int]
    below: Mapping[str, tuple[str, ...]]
    cells: Mapping[str, tuple[int, ...]]
    terms: Terms
    solver: Solver

    @staticmethod
    def of(group: AxisGroup, terms: Terms, solver: Solver) -> Fit:
        """That of a group. Fixed levels are not part of it: terms are sums over them."""
        free = [level for level in group.levels if not level.fixed]
        return Fit(
            {level.name: level.size for level in free},
            {level.name: level.below for level in free},
            {level.name: level.cells for level in free},
            terms,
            solver,
        )

    @property
    def roots(self) -> list[str]:
        """Levels that stand below none."""
        return [name for name, above in self.below.items() if not above]

    def family(self, root: str) -> list[str]:
        """A level and those below it."""
        return [name for name, above in self.below.items() if name == root or root in above]

    def value(self, parts: Parts) -> float:
        """The sum of the inner products that permutations choose."""
        return sum(float(_chosen(term, levels, levels, self, parts)) for levels, term in self.terms.items())

    def alone(self, root: str, parts: Parts) -> Fit:
        """The same for one root and what is below it, the others as ``parts`` has them."""
        family = self.family(root)
        kept: dict[tuple[str, ...], torch.Tensor] = {}
        for levels, term in self.terms.items():
            mine = tuple(name for name in levels if name in family)
            if mine:
                others = tuple(name for name in levels if name not in family)
                found = _chosen(term, levels, others, self, parts) if others else term
                kept[mine] = kept[mine] + found if mine in kept else found
        return self._of(family, kept)

    def beneath(self, root: str, here: int, there: int) -> Fit:
        """What is below a root where index ``there`` comes to the place ``here``."""
        family = [name for name in self.sizes if name != root]
        kept = {}
        for levels, term in self.terms.items():
            if root not in levels or levels == (root,):
                continue
            place = levels.index(root)
            found = term.select(place, here).select(len(levels) + place - 1, there)
            kept[tuple(name for name in levels if name != root)] = found
        return self._of(family, kept, without=root)

    def bettered(self, parts: Parts) -> tuple[Parts, float]:
        """Each root in turn, until none gains; never worse than it began."""
        roots, found = self.roots, dict(parts)
        value = self.value(found)
        for _ in range(_MOST_TURNS):
            before = value
            for root in roots:
                alone = self.alone(root, found) if len(roots) > 1 else self
                proposed = found | _best_of_root(alone, root, found)
                reached = self.value(proposed)
                if reached > value:
                    found, value = proposed, reached
            if len(roots) < 2 or value - before <= 1e-6 * abs(value):
                break
        return found, value

    def _of(self, names: Sequence[str], terms: Terms, without: str = "") -> Fit:
        below = {name: tuple(one for one in self.below[name] if one in names and one != without) for name in names}
        sizes, cells = ({name: every[name] for name in names} for every in (self.sizes, self.cells))
        return Fit(sizes, below, cells, terms, self.solver)  # type: ignore[arg-type]


def solve(
    group: AxisGroup, terms: Terms, current: Permutation, solver: Solver | None = None
) -> tuple[Permutation, float]:
    """A permutation of a group that is at least as good as the current one, and by how much it is better.

    It is the best one where no two levels that stand beside each other meet in a window. The current one is kept
    where none gains more than rounding errors.
    """
    fit = Fit.of(group, terms, Solver() if solver is None else solver)
    start = {name: current.parts.get(name, identity(group.by_name[name], group)) for name in fit.sizes}
    before = fit.value(start)
    candidates = [start]
    if any(len({_root_of(name, fit) for name in levels}) > 1 for levels in terms):
        candidates.append(_decoupled(fit, start))
    best, found = start, before
    for candidate in candidates:
        parts, value = fit.bettered(candidate)
        if value > found:
            best, found = parts, value
    if found <= before or found - before <= _rounding(terms):
        return current, 0.0
    return Permutation(group, best), found - before


def _rounding(terms: Terms) -> float:
    """How much a value may differ by the rounding of its terms alone."""
    ends = [term.aminmax() for term in terms.values() if term.numel()]
    return 1e-6 * sum(max(float(largest), -float(least)) for least, largest in ends)


def _root_of(name: str, fit: Fit) -> str:
    above = fit.below[name]
    return next((one for one in above if not fit.below[one]), name)


def _decoupled(fit: Fit, start: Parts) -> Parts:
    """Each root by the windows that it has to itself: where to begin where the others are far off."""
    found = dict(start)
    for root in fit.roots:
        family = set(fit.family(root))
        own = {levels: term for levels, term in fit.terms.items() if levels and set(levels) <= family}
        if own:
            found |= _best_of_root(fit._of(sorted(family, key=list(fit.sizes).index), own), root, start)
    return found


def _best_of_root(fit: Fit, root: str, current: Parts) -> Parts:
    """The best permutation of one root and of what is below it."""
    size, children = fit.sizes[root], [name for name in fit.sizes if name != root]
    own = fit.terms.get((root,))
    values = torch.zeros(size, size) if own is None else own
    if not children:
        return {root: fit.solver.assigned(values, fit.cells[root], current[root])}
    pairs = _Pairs(fit, root, children, values.double().numpy().copy())
    chosen = pairs.assigned(current[root])
    found: Parts = {root: chosen}
    for name in children:
        found[name] = np.zeros((*(fit.sizes[one] for one in fit.below[name]), fit.sizes[name]), np.int32)
    for here, there in enumerate(chosen):
        for name, part in pairs.below(here, int(there)).items():
            # what is below other levels as well has their dimensions behind the root's
            found[name][here] = part
    return found


class _Pairs:
    """The values of all pairs of a root's indices: what is below them is solved where it can matter."""

    def __init__(self, fit: Fit, root: str, children: Sequence[str], own: NDArray[np.float64]) -> None:
        self.fit, self.root, self.children, self.own = fit, root, children, own
        self._below: dict[tuple[int, int], tuple[Parts, float]] = {}

    def assigned(self, current: NDArray[np.int32]) -> NDArray[np.int32]:
        """The best assignment of the root: pairs are solved exactly once their upper bounds are chosen."""
        cells = self.fit.cells[self.root]
        values, exact = self._bounds()
        if exact is None:  # no bounds: all of them
            places = range(len(values))
            values = self.own + np.array([[self._solved(here, there)[1] for there in places] for here in places])
            return self.fit.solver.assigned(torch.from_numpy(values), cells, current)
        while True:
            chosen = self.fit.solver.assigned(torch.from_numpy(values), cells, current)
            open_pairs = [(here, int(there)) for here, there in enumerate(chosen) if not exact[here, there]]
            if not open_pairs:
                return chosen
            for here, there in open_pairs:
                values[here, there] = self.own[here, there] + self._solved(here, there)[1]
                exact[here, there] = True

    def below(self, here: int, there: int) -> Parts:
        """The best permutations below a pair."""
        return self._solved(here, there)[0]

    def _solved(self, here: int, there: int) -> tuple[Parts, float]:
        if (here, there) not in self._below:
            beneath = self.fit.beneath(self.root, here, there)
            start = {name: _unmoved(beneath, name) for name in self.children}
            candidates = [start]
            if any(len(levels) > 1 for levels in beneath.terms):
                candidates.append(_decoupled(beneath, start))
            reached = [beneath.bettered(one) for one in candidates]
            self._below[here, there] = max(reached, key=lambda one: one[1])
        return self._below[here, there]

    def _bounds(self) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
        """For every pair what it can have at most, and whether it has that: the sums of the largest of each row."""
        terms = {levels: term for levels, term in self.fit.terms.items() if levels != (self.root,)}
        if any(len(levels) != 2 or levels[0] != self.root for levels in terms):
            return self.own, None
        values, exact = self.own.copy(), np.ones(self.own.shape, np.bool_)
        for term in terms.values():
            largest, places = term.max(dim=3)  # of [root, child, root, child]
            values += largest.double().sum(dim=1).numpy()
            ordered = places.transpose(1, 2).sort(dim=2).values
            exact &= (ordered == torch.arange(term.shape[1])).all(dim=2).numpy()
        if any(self.fit.cells[name] for name in self.children):
            exact[:] = False
        return values, exact


def _unmoved(fit: Fit, name: str) -> NDArray[np.int32]:
    shape = (*(fit.sizes[one] for one in fit.below[name]), fit.sizes[name])
    return np.broadcast_to(np.arange(fit.sizes[name], dtype=np.int32), shape).copy()


def _chosen(term: torch.Tensor, levels: Sequence[str], chosen: Sequence[str], fit: Fit, parts: Parts) -> torch.Tensor:
    """The sum over some of a term's levels, of what comes to each place of theirs."""
    count = len(levels)
    if not chosen:
        return term
    order = [levels.index(name) for name in chosen]
    rest = [place for place in range(count) if place not in order]
    shape = tuple(fit.sizes[name] for name in chosen)
    places = dict(zip(chosen, np.indices(shape), strict=True))
    sources = []
    for name in chosen:
        part = parts[name]
        sources.append(np.broadcast_to(part[tuple(places[one] for one in (*fit.below[name], name))], shape))
    moved = term.permute(*order, *(count + place for place in order), *rest, *(count + place for place in rest))
    index = tuple(torch.from_numpy(np.ascontiguousarray(places[name])).reshape(-1) for name in chosen)
    index += tuple(torch.from_numpy(source.astype(np.int64)).reshape(-1) for source in sources)
    return moved[index].double().sum(dim=0)


class Solver:
    """Linear assignments, and how often a solver had to be asked for one."""

    def __init__(self) -> None:
        self.asked = 0

    def assigned(
        self, values: torch.Tensor, cells: Sequence[int] = (), current: NDArray[np.int32] | None = None
    ) -> NDArray[np.int32]:
        """The assignment of columns to rows with the largest sum of ``values``, within cells where there are any.

        The current one is kept where each row has its largest value already; where the largest values of rows are in
        distinct columns, those are the best, and no solver is asked.

        >>> Solver().assigned(torch.tensor([[0.0, 2.0], [1.0, 1.0]])).tolist()
        [1, 0]
        """
        found = np.empty(len(values), np.int32)
        for start, stop in stretches(cells or (len(values),)):
            block = values[start:stop, start:stop]
            now = None if current is None else current[start:stop] - start
            found[start:stop] = start + self._assigned(block, now)
        return found

    def _assigned(self, values: torch.Tensor, current: NDArray[np.int32] | None) -> NDArray[np.int32]:
        largest, places = values.max(dim=1)
        if current is not None:
            kept = values.gather(1, torch.from_numpy(current.astype(np.int64))[:, None])[:, 0]
            if bool((kept >= largest).all()):
                return current
        chosen = places.numpy()
        if np.bincount(chosen, minlength=len(values)).max(initial=0) <= 1:
            return chosen.astype(np.int32)
        self.asked += 1
        columns: NDArray[Any] = _linear_sum_assignment()(values.numpy(), maximize=True)[1]
        return columns.astype(np.int32)


def _linear_sum_assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtraError(
            "alignment needs scipy, whose solver finds assignments", hint='pip install "remelt[rebasin]"'
        ) from None
    return linear_sum_assignment


def stretches(cells: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where cells begin and end."""
    start = 0
    for cell in cells:
        yield start, start + cell
        start += cell
