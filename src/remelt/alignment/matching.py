"""Weight matching: permutations of a model's groups under which it lies nearest to a reference.

Groups are bettered one by one, each for the best permutation that it has while all others stay: coordinate descent,
after Ainsworth, Hayase and Srinivasa, "Git Re-Basin" (2209.04836), algorithm 1. A group is visited again only where a
group beside it has moved since. The sum of the inner products of both models' weights never falls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from remelt.alignment.assignment import Solver, solve
from remelt.alignment.experts import are_many, better_experts
from remelt.alignment.margins import Margins, certified
from remelt.alignment.order import outward
from remelt.alignment.permutation import Permutation, Permutations, Rotations, of_groups
from remelt.alignment.products import agreement, inner_products, squared_norms
from remelt.alignment.refusals import refuse_non_finite, refuse_unfit
from remelt.alignment.signatures import signature_start
from remelt.alignment.weights import Weights, free_windows, weighed
from remelt.archs.axis_groups import AxisGroup, is_tied, keys_of
from remelt.errors import OptionError
from remelt.recipe.permuting import BOTH, IDENTITY, SIGNATURE, STARTS

_MOST_SWEEPS = 100


@dataclass(frozen=True)
class Visit:
    """One group, bettered or left as it is: what a person is shown while matching goes on."""

    start: str
    sweep: int
    group: AxisGroup
    gain: float
    agreement: float
    """The sum of the inner products of both models' weights, after this."""
    asked: int
    """Assignments for which a solver had to be asked; 0 where largest values of rows were proof enough."""
    pending: int
    """Groups that are still to be visited in this sweep."""
    seconds: float


@dataclass(frozen=True)
class Match:
    """What was found: a permutation for each group, and how near both models lie before and after."""

    permutations: Permutations
    before: float
    after: float
    squared_norms: tuple[float, float]
    """The sums of the squares of the reference's and of the model's weights."""
    start: str
    """Where the better descent began: ``identity`` or ``signature``."""
    sweeps: int
    certified: tuple[str, ...] = ()
    """Groups of which margins prove that no permutation of theirs alone betters the identity."""
    visits: tuple[Visit, ...] = field(default=(), repr=False)
    rotations: Rotations = field(default_factory=dict, repr=False)
    """Of heads that are turned once they are permuted, where that was asked for."""

    @property
    def distances(self) -> tuple[float, float]:
        """The distance of both models' weights before and after, as a norm."""
        total = sum(self.squared_norms)
        before, after = (max(total - 2 * one, 0.0) ** 0.5 for one in (self.before, self.after))
        return before, after

    @property
    def moved(self) -> tuple[str, ...]:
        """Groups whose permutation is not the identity."""
        return tuple(name for name, one in self.permutations.items() if not one.is_identity)


def match(
    reference: Weights,
    model: Weights,
    groups: Sequence[AxisGroup],
    *,
    start: str = BOTH,
    margins: Margins | None = None,
    given: Permutations | None = None,
    crossing: bool = False,
    progress: Callable[[Visit], None] | None = None,
) -> Match:
    """Permutations of the model's groups under which it lies nearest to the reference.

    ``start`` is "identity", "signature", or "both": a second descent from where rows that hold the same numbers are
    paired, unless the first one finds nothing to move; the better one is kept. ``margins`` of the reference prove for
    groups that nothing can be gained by them alone. ``given`` permutations are where the first descent begins instead.

    Raises `OptionError` for another start, `RefusedError` for models that do not fit the groups.
    """
    found = visits(reference, model, groups, start=start, margins=margins, given=given, crossing=crossing)
    while True:
        try:
            one = next(found)
        except StopIteration as end:
            result: Match = end.value
            return result
        if progress is not None:
            progress(one)


def visits(
    reference: Weights,
    model: Weights,
    groups: Sequence[AxisGroup],
    *,
    start: str = BOTH,
    margins: Margins | None = None,
    given: Permutations | None = None,
    crossing: bool = False,
) -> Generator[Visit, None, Match]:
    """The same, one visit after another; the match is the generator's value."""
    if start not in STARTS:
        raise OptionError(f"a start is {', '.join(STARTS)}, but got {start!r}")
    free = [group for group in groups if not group.is_fixed and (crossing or not group.crosses)]
    refuse_unfit(reference, model, free)
    matched = weighed(free)
    work = Work(reference, model, matched)
    proven = certified(margins, reference, model, matched) if margins is not None and not given else ()
    first = Descent(work, IDENTITY, dict(given or {}))
    first.leave(proven)
    if start != SIGNATURE:
        yield from first.run()
    chosen, every = first, list(first.visits)
    if start == SIGNATURE or (start == BOTH and first.moved and not given):
        begin = signature_start(matched, reference, model, work.lying, Solver())
        second = Descent(work, SIGNATURE, begin)
        yield from second.run()
        every += second.visits
        if start == SIGNATURE or second.agreement > first.agreement:
            chosen = second
    return Match(
        of_groups(free, chosen.permutations),
        work.before,
        chosen.agreement,
        work.squared_norms,
        chosen.start,
        chosen.sweeps,
        tuple(name for name in proven if name not in chosen.permutations),
        tuple(every),
    )


class Work:
    """What all descents share: both models, the groups from fixed interfaces outward, and who lies beside whom."""

    def __init__(self, reference: Weights, model: Weights, groups: Sequence[AxisGroup]) -> None:
        self.reference, self.model = reference, model
        self.lying = free_windows(groups)
        self.keys = list(self.lying)
        self.groups = outward(groups, reference.shapes, self.lying)
        self.beside: dict[str, set[str]] = {group.name: set() for group in groups}
        self.tied = {group.name for group in groups if is_tied(group)}
        for windows in self.lying.values():
            names = {group.name for group, _ in windows}
            for name in names:
                self.beside[name] |= names

    @cached_property
    def _sums(self) -> tuple[float, float, float]:
        found = squared_norms(self.reference, self.model, self.keys)
        if not all(map(math.isfinite, found)):
            refuse_non_finite(self.reference, self.model, self.keys)
        return found

    @property
    def squared_norms(self) -> tuple[float, float]:
        """The sums of the squares of the reference's and of the model's weights."""
        return self._sums[:2]

    @property
    def before(self) -> float:
        """The sum of the inner products of both models' weights, nothing permuted."""
        return self._sums[2]


class Descent:
    """One descent: the permutations so far, and at which state of the groups beside it each was last visited.

    ``known`` is the sum of the inner products where it begins; it is added up where nobody knows it.
    """

    def __init__(
        self, work: Work, start: str, permutations: Mapping[str, Permutation], known: float | None = None
    ) -> None:
        self.work, self.start = work, start
        self.permutations = {name: one for name, one in permutations.items() if not one.is_identity}
        self.versions = dict.fromkeys((group.name for group in work.groups), 0)
        self.visited: dict[str, tuple[int, ...]] = {}
        self.visits: list[Visit] = []
        self.sweeps = 0
        if known is not None:
            self.agreement = known
        else:
            self.agreement = self._agreement(work.keys) if self.permutations else work.before

    @property
    def moved(self) -> bool:
        """Whether any group was moved."""
        return any(visit.gain > 0 for visit in self.visits)

    def leave(self, names: Sequence[str]) -> None:
        """Take groups as visited: nothing can be gained by them until one beside them moves."""
        for name in names:
            self.visited[name] = self._beside(name)

    def run(self) -> Generator[Visit, None, None]:
        """Sweeps over the groups until none can be bettered."""
        for sweep in range(_MOST_SWEEPS):
            stale = [group for group in self.work.groups if self.visited.get(group.name) != self._beside(group.name)]
            if not stale:
                return
            self.sweeps = sweep + 1
            for place, group in enumerate(stale):
                if self.visited.get(group.name) == self._beside(group.name):
                    continue
                one = replace(self._visit(group), sweep=sweep, pending=len(stale) - place - 1)
                self.visits.append(one)
                yield one

    def _beside(self, name: str) -> tuple[int, ...]:
        tied = name in self.work.tied  # whose own move changes what it is compared with
        return tuple(self.versions[one] for one in sorted(self.work.beside[name]) if one != name or tied)

    def _visit(self, group: AxisGroup) -> Visit:
        begun, solver, work = time.monotonic(), Solver(), self.work
        self.visited[group.name] = self._beside(group.name)
        current = self.permutations.get(group.name, Permutation(group, {}))
        models = work.reference, work.model, work.lying, self.permutations
        if are_many(group):
            proposed, gain = better_experts(group, *models, current, solver)
        else:
            proposed, gain = solve(group, inner_products(group, *models), current, solver)
        if gain > 0 and group.name in work.tied:  # on two axes of one tensor the products are those of the old one
            gain = self._gain(group, proposed)
        if gain > 0:
            self.permutations[group.name] = proposed
            self.versions[group.name] += 1
            self.agreement += gain
        return Visit(self.start, 0, group, max(gain, 0.0), self.agreement, solver.asked, 0, time.monotonic() - begun)

    def _gain(self, group: AxisGroup, proposed: Permutation) -> float:
        keys = list(dict.fromkeys(key for window in group.windows for key in keys_of(group, window)))
        before = self._agreement(keys)
        after = self._agreement(keys, {group.name: proposed})
        return after - before if after - before > 1e-6 * abs(before) else 0.0

    def _agreement(self, keys: Sequence[str], changed: Mapping[str, Permutation] | None = None) -> float:
        work, permutations = self.work, self.permutations | dict(changed or {})
        return agreement(work.reference, work.model, work.lying, permutations, keys)
