"""Many models: each matched to the first, then each in turn to the sum of all others (MergeMany).

After Ainsworth, Hayase and Srinivasa, "Git Re-Basin" (2209.04836), algorithm 3. What rises is the sum of the inner
products of all pairs of models. Only permutations are kept: the sum of the others is added up tensor by tensor, as
matching asks for it, and no permuted model is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from remelt.alignment.margins import Margins
from remelt.alignment.matching import Descent, Visit, Work, match
from remelt.alignment.permutation import Permutation, Permutations, TensorPlan, of_groups
from remelt.alignment.refusals import refuse_unfit
from remelt.alignment.weights import Lying, Weights, free_windows, weighed
from remelt.archs.axis_groups import AxisGroup
from remelt.errors import OptionError
from remelt.recipe.permuting import BOTH, OTHERS

_MOST_PASSES = 100


@dataclass(frozen=True)
class ManyMatch:
    """What was found for several models: permutations for each, under which all lie near to each other."""

    permutations: tuple[Permutations, ...]
    """In the order of the models. Those of the first move nothing, so that what depends on it still fits."""
    before: float
    """The sum of the inner products of all pairs of models, as they are."""
    aligned: float
    """The same where each is matched to the first."""
    after: float
    """The same in the end."""
    passes: int
    """How often all models were gone through to refine; the last time nothing moved."""


class SumOfModels:
    """The sum of some models as they are permuted now, as weights: added up in float32 whenever a tensor is asked for.

    One tensor of one model is held beside the sum, and that only where it is permuted.

    >>> from remelt.alignment.weights import TensorWeights
    >>> one = TensorWeights({"a": torch.tensor([1.0, 2.0])})
    >>> SumOfModels([one, one, one], [{}, {}, {}], {}).tensor("a")
    tensor([3., 6.])
    """

    def __init__(self, models: Sequence[Weights], permutations: Sequence[Permutations], lying: Lying) -> None:
        self.models, self.permutations, self.lying = models, permutations, lying
        self.shapes = models[0].shapes

    def is_float(self, key: str) -> bool:
        """Whether all of them hold floating-point numbers."""
        return all(model.is_float(key) for model in self.models)

    def tensor(self, key: str) -> torch.Tensor:
        """The sum of one tensor."""
        total = torch.zeros(self.shapes[key])
        for model, permutations in zip(self.models, self.permutations, strict=True):
            total += permuted_weight(key, model, permutations, self.lying)
        return total


def permuted_weight(key: str, model: Weights, permutations: Permutations, lying: Lying) -> torch.Tensor:
    """What a model has under a key once it is permuted: its own tensor where nothing moves."""
    windows = [(permutations[group.name], one) for group, one in lying.get(key, ()) if group.name in permutations]
    plan = TensorPlan.of(key, tuple(model.shapes[key]), windows)
    tensor = model.tensor(plan.source)
    return tensor if plan.is_identity else plan.applied(tensor)


def match_many(
    models: Sequence[Weights],
    groups: Sequence[AxisGroup],
    *,
    refine: bool = True,
    start: str = BOTH,
    margins: Margins | None = None,
    crossing: bool = False,
    progress: Callable[[int, Visit], None] | None = None,
) -> ManyMatch:
    """Permutations of several models under which each lies near to all others; the first stays as it is.

    Each is matched to the first, with ``start`` and ``margins`` of the first as in `match`. With ``refine`` each in
    turn is then matched to the sum of the others, until nothing moves; no step makes the objective worse. What the
    first is moved by is taken back from all of them in the end. Groups that tie two components are left as they are
    without ``crossing``. ``progress`` hears of the model's number and the visit.

    Raises `OptionError` for fewer than two models, `RefusedError` for models that do not fit the groups.
    """
    if len(models) < 2:
        raise OptionError(f"several models are aligned to each other, but got {len(models)}")
    free = [group for group in groups if not group.is_fixed and (crossing or not group.crosses)]
    for place, model in enumerate(models[1:], start=2):
        refuse_unfit(models[0], model, free, f"model {place}")
    work = _Refining(models, weighed(free), progress)
    before = work.objective()
    for place, model in enumerate(models[1:], start=1):
        found = match(
            models[0], model, free, start=start, margins=margins, crossing=crossing, progress=_told(progress, place)
        )
        work.permutations[place] = {name: one for name, one in found.permutations.items() if not one.is_identity}
    aligned = work.objective() if any(work.permutations) else before
    after, passes = work.run(aligned) if refine and len(models) > 2 else (aligned, 0)
    whole = tuple(of_groups(free, one) for one in work.seen_from_the_first())
    return ManyMatch(whole, before, aligned, after, passes)


def _told(progress: Callable[[int, Visit], None] | None, place: int) -> Callable[[Visit], None] | None:
    return None if progress is None else lambda visit: progress(place, visit)


class _Refining:
    """The permutations of all models, and which groups of each may gain since others moved."""

    def __init__(
        self, models: Sequence[Weights], groups: Sequence[AxisGroup], progress: Callable[[int, Visit], None] | None
    ) -> None:
        self.models, self.groups, self.progress = models, groups, progress
        self.lying = free_windows(groups)
        self.permutations: list[dict[str, Permutation]] = [{} for _ in models]

    def objective(self) -> float:
        """The sum of the inner products of all pairs: half of what the square of the sum has beside all squares."""
        total = 0.0
        together = SumOfModels(self.models, self.permutations, self.lying)
        for key in self.lying:
            sums = together.tensor(key).reshape(-1)
            total += float(torch.dot(sums, sums))
            for model in self.models:
                own = model.tensor(key).float().reshape(-1)
                total -= float(torch.dot(own, own))
        return total / 2

    def run(self, objective: float) -> tuple[float, int]:
        """Each model in turn, until none moves; the objective then, and how many passes it took."""
        stale = [{group.name for group in self.groups} for _ in self.models]
        passes = 0
        while any(stale) and passes < _MOST_PASSES:
            passes += 1
            for place in range(len(self.models)):
                if not stale[place]:
                    continue
                objective, touched = self._visit(place, stale[place], objective)
                stale[place] = set()
                for other, names in enumerate(stale):
                    if other != place:
                        names |= touched
        return objective, passes

    def _visit(self, place: int, stale: set[str], objective: float) -> tuple[float, set[str]]:
        """One model against the sum of the others; the objective, and the groups of the others that may now gain."""
        others = [other for other in range(len(self.models)) if other != place]
        reference = SumOfModels(
            [self.models[other] for other in others], [self.permutations[other] for other in others], self.lying
        )
        work = Work(reference, self.models[place], self.groups)
        descent = Descent(work, OTHERS, self.permutations[place], objective)
        descent.leave([group.name for group in self.groups if group.name not in stale])
        touched: set[str] = set()
        for visit in descent.run():
            if visit.gain > 0:
                touched |= work.beside[visit.group.name]
            if self.progress is not None:
                self.progress(place, visit)
        self.permutations[place] = descent.permutations
        return descent.agreement, touched

    def seen_from_the_first(self) -> list[dict[str, Permutation]]:
        """The permutations of all, what moves the first taken back: they lie to each other as before."""
        found: list[dict[str, Permutation]] = [{} for _ in self.models]
        for group in self.groups:
            back = self.permutations[0].get(group.name, Permutation(group, {})).inverse()
            for place, permutations in enumerate(self.permutations):
                own = permutations.get(group.name, Permutation(group, {}))
                found[place][group.name] = back.after(own) if place else Permutation(group, {})
        return found
