"""Several models aligned to each other outside recipes: each to the first, then in turn to the sum of all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from remelt.alignment.many import ManyMatch, match_many
from remelt.alignment.matching import Match
from remelt.alignment.products import agreement, squared_norms
from remelt.alignment.rotations import turned
from remelt.alignment.weights import free_windows
from remelt.api.alignment import Alignment, CheckpointWeights, Pair
from remelt.api.group import refuse
from remelt.api.opening import open_models
from remelt.api.options import PathLike
from remelt.api.rebasing import Aligned, kept, margins_of, refuse_existing
from remelt.archs.axis_groups import AxisGroup
from remelt.check.bound import bind_recipes
from remelt.errors import CheckError, OptionError, Problem, shortened
from remelt.formats.locate import models_folders
from remelt.methods import METHODS
from remelt.recipe.node import Operand
from remelt.recipe.permuting import BOTH, OTHERS, expand_permutations, rebasin

if TYPE_CHECKING:
    from remelt.alignment.matching import Visit

LEAST = 3
Progress = Callable[[str, "Visit"], None]


@dataclass(frozen=True)
class AlignedMany:
    """What aligning several models to each other found: ``models`` are all but the first, which stays as it is.

    ``before``, ``aligned`` and ``after`` are the sum of the inner products of all pairs of models as they are, each
    matched to the first, and in the end; ``passes`` is how often all were gone through to refine.
    """

    models: tuple[Aligned, ...]
    before: float
    aligned: float
    after: float
    passes: int


def align_many(
    models: Sequence[Operand],
    *,
    save: PathLike | None = None,
    margins: PathLike | None = None,
    start: str = BOTH,
    crossing: bool = False,
    rotations: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    models_dirs: Sequence[PathLike] = (),
) -> AlignedMany:
    """Find permutations under which several models lie near to each other (MergeMany); nothing is merged.

    Each is matched to the first; then each in turn to the sum of all others, until nothing moves. No permuted model is
    held: memory does not grow with their number. With ``rotations``, heads are turned towards the first one's then.
    ``save`` is a folder for a permutation file of each, ``2-NAME.safetensors`` for the second model. ``progress`` hears
    of the model and the visit. Other arguments are those of `align_models`.

    Source: Ainsworth et al., "Git Re-Basin" (2209.04836), algorithm 3.

    Raises `CheckError` with all that keeps them from being matched, `OptionError` for fewer than three models,
    `OutputError` for a file that exists.
    """
    if len(models) < LEAST:
        raise OptionError(
            f"what is refined are {LEAST} models at least, but got {len(models)}",
            hint="two are matched to each other as well as can be: remelt.align_models",
        )
    first, *others = models
    recipes = [expand_permutations(rebasin(one, to=first, start=start, crossing=crossing)) for one in others]
    graph = bind_recipes(recipes, METHODS, ["."] * len(recipes))
    with open_models(graph, models_folders([Path(folder) for folder in models_dirs])) as opened:
        refuse([*graph.problems, *opened.problems], graph)
        alignments = [opened.alignments[graph.models_of(root)[0]][-1] for root in graph.roots]
        pairs = [one.pair for one in alignments]
        places = _places(pairs, save, overwrite=overwrite)
        groups = _shared_groups(pairs)
        hearing = _Hearing([pairs[0].labels[0], *(pair.labels[1] for pair in pairs)], progress)
        known = None if margins is None else margins_of(alignments[0], Path(margins), hearing.of_the_first)
        weights = [CheckpointWeights(one) for one in (pairs[0].reference, *(pair.model for pair in pairs))]
        found = match_many(weights, groups, start=start, margins=known, crossing=True, progress=hearing.of_one)
        made = []
        for place, alignment in enumerate(alignments, start=1):
            match = _match(alignment, groups, found, place, hearing.refining[place], rotations=rotations)
            made.append(kept(alignment.pair, match, places[place - 1], overwrite=overwrite))
    return AlignedMany(tuple(made), found.before, found.aligned, found.after, found.passes)


class _Hearing:
    """Passes visits on with the names of their models, and keeps those that refine."""

    def __init__(self, labels: Sequence[str], progress: Progress | None) -> None:
        self.labels, self.progress = labels, progress
        self.refining: list[list[Visit]] = [[] for _ in labels]

    def of_the_first(self, visit: Visit) -> None:
        """What is computed of the first model alone."""
        if self.progress is not None:
            self.progress(self.labels[0], visit)

    def of_one(self, place: int, visit: Visit) -> None:
        """The visit of one model's group."""
        if visit.start == OTHERS:
            self.refining[place].append(visit)
        if self.progress is not None:
            self.progress(self.labels[place], visit)


def _places(pairs: Sequence[Pair], folder: PathLike | None, *, overwrite: bool) -> list[Path | None]:
    """Where the permutations of each model are kept; `OutputError` where a file is there."""
    if folder is None:
        return [None] * len(pairs)
    places: list[Path | None] = [place_in(folder, place, pair.labels[1]) for place, pair in enumerate(pairs, start=2)]
    for one in places:
        refuse_existing(one, overwrite=overwrite)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return places


def place_in(folder: PathLike, number: int, label: str) -> Path:
    """The permutation file of one of several models in a folder, by its number, counted from 1, and its name."""
    return Path(folder) / f"{number}-{Path(label).stem}.safetensors"


def _shared_groups(pairs: Sequence[Pair]) -> tuple[AxisGroup, ...]:
    """The groups that all models have; `CheckError` where some have one otherwise than others."""
    first, *others = pairs
    shared: dict[str, AxisGroup] = {group.name: group for group in first.matched}
    problems = []
    for pair in others:
        own = {group.name: group for group in pair.matched}
        for name in own.keys() & shared.keys():
            if own[name] != shared[name]:
                message = f"has the group {name} on other tensors than {first.labels[1]} has"
                problems.append(Problem(pair.labels[1], message, "models of one shape are aligned"))
        shared = {name: group for name, group in shared.items() if name in own}
    if problems:
        raise CheckError(shortened(problems), inputs=len(pairs) + 1)
    return tuple(shared.values())


def _match(
    alignment: Alignment,
    groups: Sequence[AxisGroup],
    found: ManyMatch,
    place: int,
    visits: Sequence[Visit],
    *,
    rotations: bool,
) -> Match:
    """What was found for one model, as a match with the first."""
    reference, model = CheckpointWeights(alignment.pair.reference), CheckpointWeights(alignment.pair.model)
    permutations, lying = found.permutations[place], free_windows(groups)
    ours, theirs, before = squared_norms(reference, model, list(lying))
    after = agreement(reference, model, lying, permutations, list(lying))
    made = Match(permutations, before, after, (ours, theirs), OTHERS, found.passes, visits=tuple(visits))
    return turned(made, reference, model, groups) if rotations else made
