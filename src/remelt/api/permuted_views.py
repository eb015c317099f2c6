"""Models and adapters whose axes are in another order: as a file says, or as is found once a merge begins."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from remelt.alignment.files import SavedPermutations
from remelt.alignment.permutation import Permutations, TensorPlan
from remelt.alignment.rotated_checkpoint import RotatedCheckpoint
from remelt.api.alignment import Alignment, pair_of, unmovable
from remelt.api.dialect_views import from_in_original, in_original
from remelt.api.rotated_views import FoundTurns, SavedTurns
from remelt.archs.axis_groups import AxisGroup, Window, keys_of, windows_by_key
from remelt.check.inputs import Input
from remelt.check.report import fold_keys
from remelt.errors import CheckError, Problem, shortened
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.overlaid import OverlaidCheckpoint
from remelt.formats.permuted import Gather, PermutedCheckpoint, Positions
from remelt.recipe.axis_orders import AlignedTo

Lying = Mapping[str, Sequence[tuple[AxisGroup, Window]]]


class PermutationGathers:
    """What permutations of groups move in the tensors that the groups' windows lie on."""

    def __init__(
        self, groups: Sequence[AxisGroup], shapes: Mapping[str, tuple[int, ...]], files: tuple[Path, ...]
    ) -> None:
        self.groups = tuple(groups)
        self.lying: Lying = windows_by_key(groups)
        self.keys: Collection[str] = self.lying.keys()
        self.shapes, self._files = shapes, files
        self._places = {
            key: (group, window, item)
            for group in groups
            for window in group.windows
            if window.chooses and not window.is_stacked
            for item, key in enumerate(keys_of(group, window))
        }

    @property
    def is_known(self) -> bool:
        """Always, where a file says it."""
        return True

    def permutations(self) -> Permutations:
        """The permutations, by group."""
        raise NotImplementedError

    def of(self, key: str) -> Gather:
        """Where the elements of a tensor come from."""
        permutations = self.permutations()
        found = [(permutations[group.name], window) for group, window in self.lying[key] if group.name in permutations]
        plan = TensorPlan.of(key, self.shapes[key], found)
        axes = {axis: row for axis, row in plan.axes.items() if not _stays(row)}
        within = {axis: rows for axis, rows in (plan.within or {}).items() if not all(map(_stays, rows))}
        return Gather(plan.source, axes, None if plan.items is None or _stays(plan.items) else plan.items, within)

    def source(self, key: str) -> str:
        """The tensor that they come from: another one where a window chooses among tensors."""
        place = self._places.get(key)
        if place is None or not self.is_known:
            return key
        group, window, item = place
        permutation = self.permutations().get(group.name)
        return key if permutation is None else window.key_of(permutation.item_of(window, item))

    def told(self) -> str:
        """The permutations, as a digest."""
        digest = hashlib.sha256()
        for name, one in sorted(self.permutations().items()):
            for level, part in sorted(one.parts.items()):
                digest.update(f"{name}\0{level}\0{part.shape}\0".encode("utf-8", "surrogatepass"))
                digest.update(part.astype("<i4").tobytes())
        return digest.hexdigest()

    def files(self) -> tuple[Path, ...]:
        """The files that decide it."""
        return self._files


class SavedGathers(PermutationGathers):
    """What a permutation file moves; its groups are those of which anything is moved or rotated."""

    def __init__(self, saved: SavedPermutations) -> None:
        super().__init__(saved.changing, saved.shapes, ())
        self._moving = saved.moving

    def permutations(self) -> Permutations:
        """Those of the file that move anything."""
        return self._moving


class FoundGathers(PermutationGathers):
    """What matching moves: found when it is first looked for."""

    def __init__(self, alignment: Alignment) -> None:
        pair = alignment.pair
        super().__init__(pair.matched, pair.shapes, pair.reference.files())
        self.alignment = alignment

    @property
    def is_known(self) -> bool:
        """Whether the models were matched."""
        return self.alignment.match is not None

    def permutations(self) -> Permutations:
        """Those that were found; they are found now where nobody asked before."""
        return self.alignment.find().permutations

    def told(self) -> str:
        """What is matched, and how: that decides what is found."""
        pair = self.alignment.pair
        matched = [group.name for group in pair.matched]
        told = repr((self.alignment.start, matched, pair.reference.view_of()))
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


def _stays(row: Positions) -> bool:
    return bool((row == np.arange(len(row))).all())


@dataclass(frozen=True)
class Saved:
    """A permutation file that a recipe names, read the way that it says."""

    label: str
    permutations: SavedPermutations


def permuted_model(given: Input, use: Saved) -> Input:
    """A model with its axes permuted as a file says; `CheckError` with all that does not fit."""
    view = in_original(given)
    if problems := [*_unfit(given, view, use), *_lacking(given, view, use)]:
        raise CheckError(shortened(problems), inputs=1)
    return _viewed(given, *_as_saved(view, use.permutations), f"permuted by {use.label}")


def permuted_adapter(given: Input, use: Saved) -> Input:
    """The differences that an adapter makes, by the model's original keys, permuted as their model is."""
    if problems := list(_unfit(given, given.checkpoint, use)):
        raise CheckError(shortened(problems), inputs=1)
    view, _ = _as_saved(given.checkpoint, use.permutations)
    return replace(given, label=f"{given.label}, permuted by {use.label}", checkpoint=view)


def aligned_model(given: Input, reference: Input, use: AlignedTo) -> tuple[Input, Alignment]:
    """A model with its axes permuted so that it resembles the reference, and what will find out how."""
    pair = pair_of(reference, given, crossing=use.crossing)
    alignment = Alignment(pair, use.start, rotations=use.rotations)
    gathers = FoundGathers(alignment)
    view: Checkpoint = PermutedCheckpoint(pair.model, gathers)
    if use.rotations:
        view = RotatedCheckpoint(view, FoundTurns(alignment))
    return _viewed(given, view, gathers.keys, f"aligned to {reference.label}"), alignment


def _as_saved(view: Checkpoint, saved: SavedPermutations) -> tuple[Checkpoint, Collection[str]]:
    """What is in the original layout as a file permutes and rotates it; and the tensors that this may change."""
    gathers = SavedGathers(saved)
    permuted = PermutedCheckpoint(view, gathers)
    return RotatedCheckpoint(permuted, SavedTurns(saved)) if saved.rotations else permuted, gathers.keys


def _viewed(given: Input, view: Checkpoint, keys: Collection[str], how: str) -> Input:
    """A model of which those tensors that anything moves in are taken from its permuted view."""
    moved = from_in_original(given, view, keys)
    return replace(given, label=f"{given.label}, {how}", checkpoint=OverlaidCheckpoint(given.checkpoint, moved))


def _unfit(given: Input, view: Checkpoint, use: Saved) -> Iterator[Problem]:
    """Why permutations are not those of a model or of a difference; ``view`` has it in the original layout."""
    saved, span, arch = use.permutations, given.model.span, given.detection.arch
    if arch is not None and saved.arch not in (None, arch.name):
        yield Problem(given.label, f"is {arch.name}, but {use.label} permutes models of {saved.arch}", span=span)
        return
    keys = SavedGathers(saved).lying
    there = [key for key in keys if key in view.tensors]
    if keys and not there:
        hint = 'name its model: adapter("...", base="...")' if given.adapter is not None else None
        yield Problem(given.label, f"has none of the {len(keys)} tensors that {use.label} permutes", hint, span)
    for key in there:
        if view.tensors[key].shape != saved.shapes[key]:
            found, wanted = list(view.tensors[key].shape), list(saved.shapes[key])
            yield Problem(given.label, f"{key} is {found}, but {use.label} permutes {wanted}", span=span)
    yield from unmovable(given, view, set(there)) if given.adapter is None else ()
    for group in SavedGathers(saved).groups:
        for window in group.windows:
            infos = {view.tensors[key] for key in keys_of(group, window) if key in view.tensors}
            if window.chooses and len({info.dtype for info in infos}) > 1:
                types = ", ".join(sorted(str(info.dtype) for info in infos))
                message = f"{window.key} are of {types}, but {use.label} puts one in the place of another"
                yield Problem(given.label, message, "store them in one type: --dtype", span)


def _lacking(given: Input, view: Checkpoint, use: Saved) -> Iterator[Problem]:
    """Groups of which a model has some tensors, but not all."""
    for group in SavedGathers(use.permutations).groups:
        keys = list(dict.fromkeys(key for window in group.windows for key in keys_of(group, window)))
        lacking = [key for key in keys if key not in view.tensors]
        if lacking and len(lacking) < len(keys):
            count = f"{len(lacking)} of {len(keys)} tensors"
            message = f"lacks {count} that {use.label} permutes as the group {group.name}: {fold_keys(lacking)}"
            yield Problem(given.label, message, span=given.model.span)
