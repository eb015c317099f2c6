"""Two models whose weights are to be matched: what is known of them from their headers, and what is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING

from remelt.alignment.files import SavedPermutations
from remelt.api.configurations import CONFIG, read_json
from remelt.api.dialect_views import from_in_original, in_original
from remelt.archs.axes.find import SPECIFICATIONS, axis_groups
from remelt.archs.axes.heads import HeadRule, Heads
from remelt.archs.axes.language import heads_of_configuration, language_groups
from remelt.archs.axes.recognise import recognise_network
from remelt.archs.axis_groups import AxisGroup, Shapes, Window, faults, keys_of, windows_by_key
from remelt.check.inputs import Input
from remelt.check.report import fold_keys
from remelt.errors import CheckError, Problem, shortened
from remelt.formats.checkpoint import Checkpoint
from remelt.recipe.permuting import BOTH

if TYPE_CHECKING:
    import torch

    from remelt.alignment.margins import Margins
    from remelt.alignment.matching import Match, Visit

_UNITS = ("", "k", "M", "G", "T", "P", "E")


class CheckpointWeights:
    """The tensors of an opened model, as they are stored: views of its file wherever that can be."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shapes: Shapes = {key: info.shape for key, info in checkpoint.tensors.items()}

    def is_float(self, key: str) -> bool:
        """Whether a tensor holds floating-point numbers, one an element."""
        return self.checkpoint.tensors[key].dtype.is_float

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor, in the type in which it is stored."""
        from remelt.tensors import tensor_over

        info = self.checkpoint.tensors[key]
        return tensor_over(self.checkpoint.read(key), info.dtype).reshape(info.shape)


@dataclass(frozen=True)
class Pair:
    """A model that is to be aligned to a reference, both in the original layout, and the groups that are matched.

    ``groups`` are all groups of the model. ``left`` are those that are not matched: they tie several components, or the
    reference has nothing of them. ``following`` are tensors that the reference lacks and needs not have: running
    averages, and copies of embeddings. They are permuted, but not compared.
    """

    arch: str
    labels: tuple[str, str]
    reference: Checkpoint
    model: Checkpoint
    groups: tuple[AxisGroup, ...]
    left: frozenset[str] = frozenset()
    following: frozenset[str] = frozenset()

    @property
    def matched(self) -> tuple[AxisGroup, ...]:
        """The groups that are matched."""
        return tuple(group for group in self.groups if not group.is_fixed and group.name not in self.left)

    @property
    def compared(self) -> tuple[AxisGroup, ...]:
        """The same, with the windows by which the models are compared."""

        def is_there(group: AxisGroup, window: Window) -> bool:
            return not any(key in self.following for key in keys_of(group, window))

        return tuple(
            replace(group, windows=tuple(window for window in group.windows if is_there(group, window)))
            for group in self.matched
        )

    @property
    def shapes(self) -> Shapes:
        """The shapes of the model's tensors."""
        return {key: info.shape for key, info in self.model.tensors.items()}

    @property
    def work(self) -> float:
        """The floating-point operations of one dense sweep: those of all cost matrices."""
        shapes = self.shapes
        lying = windows_by_key(self.matched)
        return sum(_work(*one, key, shapes) for key, windows in lying.items() for one in windows)

    def told(self) -> str:
        """What is matched, for a person: the groups, and what a dense sweep takes."""
        return f"{len(self.matched)} groups, {format_work(self.work)} a dense sweep"


def pair_of(reference: Input, model: Input, *, crossing: bool = False) -> Pair:
    """A model and the reference that it is to be aligned to, with the groups to match.

    Raises `CheckError` with all that keeps them from being matched: archs, shapes, missing or integer tensors, and
    groups that are wrong.
    """
    first, second = arch_of(reference), arch_of(model)
    if first != second:
        message = f"is {second}, but {reference.label}, to which it is to be aligned, is {first}"
        raise CheckError([Problem(model.label, message, span=model.model.span)], inputs=2)
    views = in_original(reference), in_original(model)
    groups = groups_of(model, views[1])
    absent = {
        group.name
        for group in groups
        if not group.is_fixed and all(key not in views[0].tensors for key in windows_by_key([group]))
    }
    crossed = {group.name for group in groups if group.crosses and not crossing}
    following = frozenset(key for key in windows_by_key(groups) if key not in views[0].tensors and _follows(model, key))
    pair = Pair(second, (reference.label, model.label), *views, groups, frozenset(absent | crossed), following)
    problems = [*_differences(pair), *_unmovable(reference, pair), *_unmovable(model, pair)]
    if problems:
        raise CheckError(shortened(problems), inputs=2)
    return pair


def _follows(given: Input, key: str) -> bool:
    """Whether a tensor is a running average of another one, or a copy of embeddings that others do without."""
    arch = given.detection.arch
    if arch is None:
        return False
    shadow = arch.shadow is not None and key.startswith(arch.shadow.prefix)
    return shadow or any(key == pair[0] for pair in arch.tied)


def arch_of(given: Input) -> str:
    """The specification that tells a model's axis groups: its arch, or what its keys are without one.

    Raises `CheckError` where there is none.
    """
    arch = given.detection.arch
    name = recognise_network(_shapes(given.checkpoint)) if arch is None else arch.name
    if name is None:
        message = f"is of no known arch, so that nobody can tell its axis groups: {given.detection.evidence}"
        hint = "remelt.groups_from_module derives those of a module"
        raise CheckError([Problem(given.label, message, hint, given.model.span)], inputs=2)
    return name


def groups_of(given: Input, view: Checkpoint) -> tuple[AxisGroup, ...]:
    """All axis groups of a model by its view in the original layout; `CheckError` where they lack any of its axes."""
    name, shapes = arch_of(given), _shapes(view)
    groups = axis_groups(name, shapes, heads_of(given))
    if wrong := list(faults(groups, shapes)):
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        message = f"the axis groups of {name} do not fit it: {shown}"
        raise CheckError(
            [Problem(given.label, message, "it is of a variant that is not known", given.model.span)], inputs=2
        )
    return groups


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in checkpoint.tensors.items()}


def _differences(pair: Pair) -> Iterator[Problem]:
    """Tensors that lie on permuted axes, and that the reference lacks or has in another shape."""
    reference, model = pair.labels
    keys = [key for key in windows_by_key(pair.matched) if key not in pair.following]
    if lacking := [key for key in keys if key not in pair.reference.tensors]:
        count = f"{len(lacking)} tensor{'s' if len(lacking) > 1 else ''}"
        message = f"lacks {count} that {model} has, of groups that it has otherwise: {fold_keys(lacking)}"
        yield Problem(reference, message, "models of one shape are aligned")
    for key in keys:
        if key in pair.reference.tensors:
            ours, theirs = pair.reference.tensors[key].shape, pair.model.tensors[key].shape
            if ours != theirs:
                message = f"{key} is {list(theirs)}, but {list(ours)} in {reference}"
                yield Problem(model, message, "models of one shape are aligned")


def _unmovable(given: Input, pair: Pair) -> Iterator[Problem]:
    view = pair.reference if given.label == pair.labels[0] else pair.model
    yield from unmovable(given, view, set(windows_by_key(pair.matched)))


def unmovable(given: Input, view: Checkpoint, keys: Collection[str]) -> Iterator[Problem]:
    """The tensors of an input that hold no floating-point numbers, one an element, but lie on permuted axes.

    ``view`` is the input in the original layout, ``keys`` are of that.
    """
    own = from_in_original(given, view, keys).tensors
    quantised = [key for key in own if key in given.checkpoint.quantised]
    if quantised:
        message = f"{_tensors(quantised)} on permuted axes, but quantised: {fold_keys(quantised)}"
        hint = f"dequantise it first: remelt merge {given.label} --dtype bf16 -o OUT"
        yield Problem(given.label, message, hint, given.model.span)
    whole = [key for key in own if key not in quantised and not given.checkpoint.tensors[key].dtype.is_float]
    if whole:
        types = ", ".join(sorted({str(given.checkpoint.tensors[key].dtype) for key in whole}))
        message = f"{_tensors(whole)} on permuted axes, but of {types}: {fold_keys(whole)}"
        yield Problem(given.label, message, "only floating-point numbers are permuted", given.model.span)


def _tensors(keys: Sequence[str]) -> str:
    return "1 tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"


def heads_of(given: Input) -> Heads:
    """The head rules that the configuration beside a model tells; none where there is no such file."""
    path = given.checkpoint.path
    file = None if path is None else (path if path.is_dir() else path.parent) / CONFIG
    if file is None or not file.is_file():
        return {}
    told, name = read_json(file), arch_of(given)
    if SPECIFICATIONS[name] is language_groups:
        return heads_of_configuration(told)
    count = told.get("num_attention_heads")
    return {"vision": HeadRule(count=count)} if name == "vit" and isinstance(count, int) else {}


def align(
    pair: Pair,
    *,
    start: str = BOTH,
    margins: Margins | None = None,
    rotations: bool = False,
    progress: Callable[[Visit], None] | None = None,
) -> Match:
    """The permutations of a pair's groups under which the model lies nearest to the reference.

    With ``rotations``, heads are then turned to where they lie nearer still.
    """
    from remelt.alignment.matching import match
    from remelt.alignment.permutation import of_groups
    from remelt.alignment.rotations import turned

    reference, model = CheckpointWeights(pair.reference), CheckpointWeights(pair.model)
    found = match(reference, model, pair.compared, start=start, margins=margins, crossing=True, progress=progress)
    found = replace(found, permutations=of_groups(pair.matched, found.permutations))
    return turned(found, reference, model, pair.compared) if rotations else found


def saved(pair: Pair, found: Match, *, reference: str = "", model: str = "") -> SavedPermutations:
    """A match as a permutation file has it; ``reference`` and ``model`` are the hashes of their contents."""
    visits = {visit.group.name: visit for visit in found.visits if visit.start == found.start}
    reports = {
        name: {"gain": sum(one.gain for one in found.visits if (one.group.name, one.start) == (name, found.start))}
        | {"solver": visit.asked, "moved": not found.permutations[name].is_identity}
        for name, visit in visits.items()
    }
    unsolved = {name for name, visit in visits.items() if not visit.asked} | set(found.certified)
    return SavedPermutations(
        found.permutations,
        pair.groups,
        pair.shapes,
        pair.arch,
        reference=reference,
        model=model,
        before=found.before,
        after=found.after,
        certified=len(unsolved) / max(len(found.permutations), 1),
        reports=reports,
        rotations=found.rotations,
    )


@dataclass(eq=False)
class Alignment:
    """Permutations and rotations that are found once: when they are asked for, or when the model is first read."""

    pair: Pair
    start: str = BOTH
    margins: Margins | None = None
    rotations: bool = False
    match: Match | None = None
    """What was found, once it is."""
    lock: Lock = field(default_factory=Lock, repr=False)

    def told(self) -> str:
        """What is done before a merge of the model begins, for a person."""
        reference, model = self.pair.labels
        crossing = sum(bool(group.crosses) for group in self.pair.groups if group.name in self.pair.left)
        left = f"; {crossing} that tie components are left as they are" if crossing else ""
        turned = ", and the heads' rotations" if self.rotations else ""
        return f"{model} is aligned to {reference} first: {self.pair.told()}{turned}{left}"

    def find(self, progress: Callable[[Visit], None] | None = None) -> Match:
        """What is found: the same for every call, and for every run."""
        with self.lock:
            if self.match is None:
                self.match = align(
                    self.pair, start=self.start, margins=self.margins, rotations=self.rotations, progress=progress
                )
            return self.match


def format_work(count: float) -> str:
    """A number of floating-point operations for a person.

    >>> format_work(29.2e12), format_work(512)
    ('29.2 TFLOP', '512 FLOP')
    """
    power = min(int(math.log10(count)) // 3, len(_UNITS) - 1) if count >= 1000 else 0
    return f"{count / 1000**power:.3g} {_UNITS[power]}FLOP"


def _work(group: AxisGroup, window: Window, key: str, shapes: Shapes) -> float:
    """The operations of a group's cost matrices on what a window has of one tensor."""
    pairs, share = 1.0, 1.0
    for name in window.levels:
        level = group.by_name[name]
        if not level.fixed:
            pairs *= sum(cell * cell for cell in level.cells or (level.size,)) / level.size
    if window.along:
        axis = window.axis + window.is_stacked
        share = math.prod(group.shape(window.along)) * window.run / shapes[key][axis]
    return 2.0 * pairs * math.prod(shapes[key]) * share
