"""From the names in a recipe to opened models: looked up, headers read, archs detected, locks verified."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from remelt.adapters.names import is_adapter
from remelt.api.hashing import content_hash, find_by_hash
from remelt.api.layer_views import view_of_layers
from remelt.api.token_views import TokenAlignedCheckpoint
from remelt.api.tying import Heads, settle_heads
from remelt.api.vocabulary import Member, SharedVocabulary, Tokens, tokenizer_of
from remelt.archs.detect import detect
from remelt.check.bound import BoundGraph
from remelt.check.inputs import Input
from remelt.errors import CheckError, ModelNameError, Problem, RemeltError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.locate import locate_model
from remelt.formats.memory import MemoryCheckpoint
from remelt.formats.quantised import dequantised
from remelt.recipe.axis_orders import PermutedBy
from remelt.recipe.mixture import BASE, label_of_part
from remelt.recipe.node import AdapterUse, Model, Vocabulary

if TYPE_CHECKING:
    from remelt.api.alignment import Alignment
    from remelt.api.permuted_views import Saved
    from remelt.api.permuting import Permuting


@dataclass
class Opened:
    """The models of a bound graph; a context that closes their files."""

    inputs: dict[int, Input] = field(default_factory=dict)
    bases: dict[int, Input] = field(default_factory=dict)
    """For adapters, the model that the recipe says they change."""
    heads: Heads = field(default_factory=Heads)
    before: dict[int, Input] = field(default_factory=dict)
    """Models that are read with permuted axes, without that."""
    permutations: dict[int, list[Saved]] = field(default_factory=dict)
    """For adapters that follow a permuted model, by what: they are differences only once their models are known."""
    alignments: dict[int, list[Alignment]] = field(default_factory=dict)
    """For models that are aligned to others, what finds out how."""
    problems: list[Problem] = field(default_factory=list)
    _files: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_models(graph: BoundGraph, models_dirs: Sequence[Path]) -> Opened:
    """Open every model of the graph; what cannot be opened is a problem, all of them at once.

    Models that turn out to be one file in one space become one input: the graph's steps are pointed to the first.
    """
    opened = Opened()
    known: dict[tuple[object, ...], int] = {}
    canonical: dict[int, int] = {}
    for index, model in enumerate(graph.models):
        try:
            identity, given = _open(model, Path(graph.scopes[index] or "."), models_dirs, opened, known)
        except RemeltError as error:
            hint = None if error.hint is None else f"hint: {error.hint}"
            opened.problems.append(Problem("", error.message, hint, model.span))
            continue
        canonical[index] = known.setdefault(identity, index)
        if given is not None:
            opened.inputs[index] = given
            if given.adapter is not None:
                _open_base(index, given.adapter, graph.scopes[index], models_dirs, opened)
    opened.heads = settle_heads(graph, opened.inputs)
    _permute(graph, models_dirs, opened)
    _view_layers(opened)
    _align_vocabularies(graph, models_dirs, opened)
    for place, step in enumerate(graph.steps):
        if step.input is not None and canonical.get(step.input, step.input) != step.input:
            graph.steps[place] = replace(step, input=canonical[step.input])
        _mark_adapter(graph, place, opened)
    _make_labels_unique(opened)
    return opened


def _mark_adapter(graph: BoundGraph, place: int, opened: Opened) -> None:
    """Have a step that turned out to read an adapter give a delta."""
    step = graph.steps[place]
    given = None if step.input is None else opened.inputs.get(step.input)
    if given is not None and given.adapter is not None and isinstance(step.node, Model):
        graph.steps[place] = replace(step, node=replace(step.node, space="delta"))


def _open_base(index: int, use: AdapterUse, scope: str, models_dirs: Sequence[Path], opened: Opened) -> None:
    """Open the model that an adapter is said to change; one that the recipe reads anyway is not opened twice."""
    if use.base is None:
        return
    try:
        _, given = _open(use.base, Path(scope or "."), models_dirs, opened, {})
    except RemeltError as error:
        hint = None if error.hint is None else f"hint: {error.hint}"
        opened.problems.append(Problem("", error.message, hint, use.base.span))
        return
    assert given is not None
    opened.bases[index] = given


def _open(
    model: Model, folder: Path, models_dirs: Sequence[Path], opened: Opened, known: dict[tuple[object, ...], int]
) -> tuple[tuple[object, ...], Input | None]:
    checkpoint: Checkpoint
    if model.tensors is not None:
        from remelt.tensors import describe_tensors

        identity: tuple[object, ...] = (id(model.tensors), model.space, *_views(model))
        if identity in known:
            return identity, None
        held = model.tensors
        checkpoint = held if isinstance(held, Checkpoint) else MemoryCheckpoint(describe_tensors(held, model.name))
        label = model.name
    else:
        folders = [folder, *models_dirs]
        path = _locate(model, folders)
        identity = (path.resolve(), model.space, model.sha256, *_views(model))
        if identity in known:
            return identity, None
        checkpoint = opened._files.enter_context(dequantised(_open_locked(path, model, folders)))
        label = (checkpoint.path or path).name
    if model.part is not None and model.part.role != BASE:
        label = label_of_part(label, model.part)
    use = model.adapter
    if not isinstance(model.tensors, Checkpoint) and is_adapter(checkpoint.tensors) and model.space != "param":
        use, model = use or AdapterUse(), replace(model, space="delta")
    elif use is not None:
        raise ModelNameError(f"{label} is no adapter: its tensors are those of a model", hint=f'model("{model.name}")')
    return identity, Input(label, model, checkpoint, detect(checkpoint.tensors, model.arch), use)


def _views(model: Model) -> tuple[object, ...]:
    """What is read of a model, and as what."""
    return model.layers, model.vocabulary, model.adapter, model.part, model.permuted


def _permute(graph: BoundGraph, models_dirs: Sequence[Path], opened: Opened) -> None:
    """Have models be read with permuted axes, where the recipe says so."""
    if not any(given.model.permuted for given in opened.inputs.values()):
        return
    from remelt.api.permuting import Permuting  # imports torch

    by_scope: dict[str, Permuting] = {}
    for index, given in list(opened.inputs.items()):
        if given.model.permuted is None:
            continue
        scope = graph.scopes[index]
        permuting = by_scope.setdefault(scope, _permuting(Permuting, Path(scope or "."), models_dirs, opened))
        try:
            if given.adapter is not None:
                opened.permutations[index] = permuting.adapter(given)
                continue
            opened.before[index] = given
            opened.inputs[index], opened.alignments[index] = permuting.model(given)
        except CheckError as error:
            opened.problems += error.problems
        except RemeltError as error:
            hint = None if error.hint is None else f"hint: {error.hint}"
            opened.problems.append(Problem("", error.message, hint, given.model.span))


def _permuting(kind: type[Permuting], folder: Path, models_dirs: Sequence[Path], opened: Opened) -> Permuting:
    def open_model(model: Model) -> Input:
        _, given = _open(model, folder, models_dirs, opened, {})
        assert given is not None
        return given

    def locate(use: PermutedBy) -> Path:
        folders = [folder, *models_dirs]
        path = _locate(Model(use.name, use.sha256), folders)
        if use.sha256 is None:
            return path
        with _open_locked(path, Model(use.name, use.sha256), folders) as checkpoint:
            return checkpoint.path or path

    return kind(open_model, locate)


def _view_layers(opened: Opened) -> None:
    """Have those models of which some layers are read be those layers."""
    for index, given in list(opened.inputs.items()):
        wanted = given.model.layers
        if wanted is None:
            continue
        try:
            view = view_of_layers(given.checkpoint, wanted, given.label)
        except RemeltError as error:
            hint = None if error.hint is None else f"hint: {error.hint}"
            opened.problems.append(Problem("", error.message, hint, given.model.span))
            continue
        label = f"{given.label}, layers {wanted.start} to {wanted.stop}"
        opened.inputs[index] = replace(given, label=label, checkpoint=view, detection=detect(view.tensors))


def _align_vocabularies(graph: BoundGraph, models_dirs: Sequence[Path], opened: Opened) -> None:
    """Put the rows for tokens in order, of those models that are asked to have one vocabulary."""
    groups: dict[tuple[str, Vocabulary], list[int]] = {}
    for index, given in opened.inputs.items():
        if given.model.vocabulary is not None:
            groups.setdefault((graph.scopes[index], given.model.vocabulary), []).append(index)
    if opened.problems:
        return
    for (folder, wanted), indexes in groups.items():
        try:
            members: dict[Path | None, Member] = {}
            for index in indexes:
                given = opened.inputs[index]
                if given.checkpoint.path not in members:
                    members[given.checkpoint.path] = Member.of(given.label, given.checkpoint)
            folders = [Path(folder or "."), *models_dirs]
            first = Tokens.read(_locate(Model(wanted.first), folders), wanted.first)
            base = None if wanted.base is None else tokenizer_of(_locate(Model(wanted.base), folders))
            shared = SharedVocabulary.of(
                first,
                base,
                list(members.values()),
                union=wanted.union,
                new_rows=wanted.new_rows,
                multiple=wanted.multiple,
            )
            for index in indexes:
                given = opened.inputs[index]
                place = list(members).index(given.checkpoint.path)
                view = TokenAlignedCheckpoint(given.checkpoint, shared, place)
                opened.inputs[index] = replace(given, checkpoint=view)
        except RemeltError as error:
            hint = None if error.hint is None else f"hint: {error.hint}"
            opened.problems.append(Problem("", error.message, hint, opened.inputs[indexes[0]].model.span))


def _locate(model: Model, folders: Sequence[Path]) -> Path:
    """The model's file; where the recipe is locked, one of another name but of that content will do.

    Links are not followed: a file is called by the name that was asked for, not by its name in a cache.
    """
    try:
        found = locate_model(model.name, folders)
    except ModelNameError:
        by_hash = find_by_hash(model.sha256, folders) if model.sha256 is not None else None
        if by_hash is None:
            raise
        found = by_hash
    return found.resolve() if found.name in ("", "..") else found.absolute()


def _open_locked(path: Path, model: Model, folders: Sequence[Path]) -> Checkpoint:
    """The model opened; where it is locked to another content, a file that has it, or an error that tells both."""
    checkpoint = open_checkpoint(path)
    if model.sha256 is None or (found := content_hash(checkpoint)) == model.sha256.lower():
        return checkpoint
    checkpoint.close()
    elsewhere = find_by_hash(model.sha256, folders)
    if elsewhere is None:
        raise ModelNameError(
            f"{model.name} is locked to content {model.sha256[:16]}..., but {path} has {found[:16]}...",
            hint="use the file that the recipe was made with, or remelt lock the recipe anew",
        )
    return open_checkpoint(elsewhere)


def _make_labels_unique(opened: Opened) -> None:
    """Make labels that several inputs have longer, by parts of their paths, until each is one input's alone."""
    alike: dict[str, list[int]] = {}
    for index, given in opened.inputs.items():
        alike.setdefault(given.label, []).append(index)
    for label, indexes in alike.items():
        if len(indexes) < 2:
            continue
        paths = {index: path for index in indexes if (path := opened.inputs[index].checkpoint.path) is not None}
        tails, times = _distinct_tails(set(paths.values())), Counter(paths.values())
        for index in indexes:
            path, space = paths.get(index), opened.inputs[index].model.space
            longer = f"{label} #{index + 1}" if path is None else tails[path]
            if path is not None and times[path] > 1 and space != "weight":
                longer = f"{longer} ({space})"
            opened.inputs[index] = replace(opened.inputs[index], label=longer)


def _distinct_tails(paths: set[Path]) -> dict[Path, str]:
    """The shortest end of each path that no other has."""
    found: dict[Path, str] = {}
    count = 1
    while len(found) < len(paths):
        tails = {path: "/".join(path.parts[-count:]) for path in paths}
        times = Counter(tails.values())
        for path, tail in tails.items():
            if times[tail] == 1 or count >= len(path.parts):
                found.setdefault(path, tail)
        count += 1
    return found
