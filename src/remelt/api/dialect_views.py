"""Models that name the same weights otherwise, in one spelling: views that are converted where they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from remelt.api.outputs import SUFFIX
from remelt.archs.arch import Arch
from remelt.archs.detect import Detection, detect
from remelt.archs.dialects import (
    IN_FULL,
    ORIGINAL,
    Conversion,
    Spelling,
    dialects_of,
    from_original,
    is_left_out,
    is_of_folders,
    keys_of_another_layout,
    original_key,
    spelling_of_part,
    to_original,
    usual_key,
)
from remelt.check.inputs import Input, ambiguity_of
from remelt.core.nearest import nearest_hint
from remelt.errors import OptionError, Problem, RemeltError
from remelt.formats.checkpoint import Checkpoint, open_checkpoint
from remelt.formats.pieced import PiecedCheckpoint
from remelt.formats.renamed import RenamedCheckpoint

_SHOWN = 3
WITHOUT_A_PLACE = "without a place in the layout of the result"


def wanted_dialect(asked: str | None, outputs: Sequence[Path | None], first: Input) -> str | None:
    """The dialect of the results: the one that is asked for; for single files never one of folders.

    Raises `OptionError` where a single file is asked for in a dialect of folders.
    """
    files = [path for path in outputs if path is not None and path.suffix == SUFFIX]
    arch, spelling = first.detection.arch, first.detection.spelling
    if not files or arch is None or spelling.alone:
        return asked
    if asked is not None and is_of_folders(arch, asked):
        raise OptionError(
            f"a model in {asked}'s layout is a folder, but the output is the file {files[0].name}",
            hint=f"-o {files[0].stem}/",
        )
    folders = is_of_folders(arch, spelling.dialect)
    return ORIGINAL if asked is None and folders and len(files) == len(outputs) else asked


def in_one_spelling(
    inputs: Mapping[int, Input], order: Sequence[int], dialect: str | None, like: Path | None, problems: list[Problem]
) -> tuple[dict[int, Input], Spelling]:
    """The inputs with their keys spelled as the first one's are, or in a dialect; and that spelling.

    Where a dialect has several names for one key, that of the folder ``like`` counts, or the first input's. What cannot
    be converted is a problem. Inputs of no known arch stay as they are.
    """
    known = [inputs[index] for index in order if inputs[index].detection.arch is not None]
    whole = [one for one in known if one.detection.arch is not None and not one.detection.arch.part]
    first = next(iter(whole or known), None)
    if first is None:
        if dialect is not None:
            given = inputs[order[0]]
            message = f"is of no known arch, so that nobody can tell how {dialect} names its keys"
            problems.append(ambiguity_of(given) or Problem(given.label, message))
        return dict(inputs), IN_FULL
    arch, wanted = first.detection.arch, first.detection.spelling
    assert arch is not None
    if dialect is not None:
        if dialect not in dialects_of(arch):
            hint = nearest_hint(dialect, dialects_of(arch)) or f"those of {arch.name}: {', '.join(dialects_of(arch))}"
            raise OptionError(f"{arch.name} has no dialect named {dialect!r}", hint=hint)
        wanted = Spelling(dialect, wanted.alone)
    inputs = _with_parts(inputs, arch, first)
    names = {usual_key(arch, wanted, key): key for key in _followed(first, wanted, like)}
    found: dict[int, Input] = {}
    for index, given in inputs.items():
        found[index] = given
        if given.detection.arch is None or given.detection.arch.name != arch.name:
            continue
        if (mixed := _mixed(given, arch)) is not None:
            problems.append(mixed)
            continue
        try:
            checkpoint = respelled(given.checkpoint, arch, given.detection.spelling, wanted)
            checkpoint = _renamed(checkpoint, arch, wanted, names)
            if given.model.layers is None and given.model.vocabulary is None and given.adapter is None:
                checkpoint = _untied(checkpoint, arch, first.checkpoint, wanted.start)
        except RemeltError as error:
            problems.append(Problem(given.label, error.message, error.hint, given.model.span))
            continue
        found[index] = replace(given, checkpoint=checkpoint)
    return found, wanted


def _mixed(given: Input, arch: Arch) -> Problem | None:
    """The problem of a file with keys of two layouts, if it has."""
    own = given.detection.spelling
    found = keys_of_another_layout(arch, own, given.checkpoint.tensors)
    if found is None:
        return None
    dialect, keys = found
    shown = ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
    message = f"is of the layout {own.dialect}, but some of its keys are of {dialect}: {shown}"
    return Problem(given.label, message, "a file has one layout: leave the others out", given.model.span)


def _untied(checkpoint: Checkpoint, arch: Arch, first: Checkpoint, start: str) -> Checkpoint:
    """A checkpoint with each name of a tensor that the first one has, too: files leave out all but one of them."""
    names = {key: key for key in checkpoint.tensors}
    for tied in ([start + name for name in names] for names in arch.tied):
        held = next((name for name in tied if name in checkpoint.tensors), None)
        for name in tied:
            if held is not None and name in first.tensors and name not in checkpoint.tensors:
                names[name] = held
    return checkpoint if len(names) == len(checkpoint.tensors) else RenamedCheckpoint(checkpoint, names)


def stem_of(arch: Arch | None, spelling: Spelling) -> str:
    """What diffusers calls the file of weights in the folder of a component alone, without its suffix."""
    for component in [] if arch is None else arch.components:
        for one in component.dialects:
            if (one.dialect, component.name) == (spelling.dialect, spelling.alone):
                return "model" if one.folder.startswith("text_encoder") else "diffusion_pytorch_model"
    return "model"


def left_out_of(checkpoint: Checkpoint) -> Iterator[str]:
    """Keys of a file for which the layout that it is read in has no place."""
    while isinstance(checkpoint, (PiecedCheckpoint, RenamedCheckpoint)):
        yield from checkpoint.left_out if isinstance(checkpoint, PiecedCheckpoint) else ()
        checkpoint = checkpoint.checkpoint


def keys_without_a_place(inputs: Iterable[Input], spelling: Spelling) -> frozenset[str]:
    """Original keys for which the layout of some input has no place: it lacks them, whatever it was made of."""
    if spelling.dialect != ORIGINAL:
        return frozenset()
    found: set[str] = set()
    given = list(inputs)
    keys = dict.fromkeys(key for one in given for key in one.checkpoint.tensors)
    others = {(one.name, dialect): one for one, dialect in map(_known_as, given) if one is not None}
    for (_, dialect), arch in others.items():
        if dialect != ORIGINAL:
            found.update(key for key in keys if is_left_out(arch, dialect, original_key(arch, spelling, key)))
    return frozenset(found)


def _known_as(given: Input) -> tuple[Arch | None, str]:
    return given.detection.arch, given.detection.spelling.dialect


def _with_parts(inputs: Mapping[int, Input], arch: Arch, first: Input) -> dict[int, Input]:
    """The inputs, of which those that hold one component of the first one's arch alone are told to be that."""
    known: set[str] | None = None
    found = dict(inputs)
    for index, given in inputs.items():
        own = given.detection.arch
        if given.detection.problem is not None or (own is not None and (own.name == arch.name or not own.part)):
            continue
        if known is None:
            known = {original_key(arch, first.detection.spelling, key) for key in first.checkpoint.tensors}
        told = [
            (*spelled, checkpoint)
            for checkpoint, start in _as_others_spell_it(given)
            if (spelled := spelling_of_part(arch, checkpoint.tensors, known, dict.fromkeys(("", start)))) is not None
        ]
        if told:
            spelling, _, checkpoint = max(told, key=lambda one: one[1])
            evidence = f"{arch.name}: its keys are those of {spelling.alone or 'a part'} of {first.label}"
            if spelling.alone:
                checkpoint = _of_component(checkpoint, arch, spelling, known)
            found[index] = replace(given, checkpoint=checkpoint, detection=Detection(arch, evidence, spelling=spelling))
    return found


def _as_others_spell_it(given: Input) -> Iterator[tuple[Checkpoint, str]]:
    """A part of models in each layout that its own arch knows, its own first, with what stands before its keys.

    The text encoder of one arch is held in the layout of OpenCLIP, that of another in transformers'.
    """
    own, spelling = given.detection.arch, given.detection.spelling
    yield given.checkpoint, spelling.start
    if own is None:
        return
    for dialect in dialects_of(own):
        if dialect != spelling.dialect:
            with contextlib.suppress(RemeltError):  # its parts are no whole: it is told as it is
                yield respelled(given.checkpoint, own, spelling, Spelling(dialect, spelling.alone)), ""


def _of_component(checkpoint: Checkpoint, arch: Arch, spelling: Spelling, known: Collection[str]) -> Checkpoint:
    """What a file has of a component: what else training left in it is nothing that the whole model has."""
    kept = {key: key for key in checkpoint.tensors if original_key(arch, spelling, key) in known}
    return checkpoint if len(kept) == len(checkpoint.tensors) else RenamedCheckpoint(checkpoint, kept)


def _followed(first: Input, wanted: Spelling, like: Path | None) -> list[str]:
    """The keys whose names are followed where there are several: those of a folder, or of the first input."""
    if like is not None:
        with open_checkpoint(like) as checkpoint:
            if detect(checkpoint.tensors).spelling == wanted:
                return list(checkpoint.tensors)
    return list(first.checkpoint.tensors) if wanted == first.detection.spelling else []


def respelled(checkpoint: Checkpoint, arch: Arch, spelling: Spelling, wanted: Spelling) -> Checkpoint:
    """A checkpoint as a view with its keys in another spelling.

    Raises `RemeltError` where it has keys that could not be told there.
    """
    if spelling == wanted:
        return checkpoint
    view = checkpoint
    if spelling != IN_FULL:
        view = _view(view, to_original(arch, spelling, view.tensors), f"{spelling.dialect} layout of {arch.name}")
    if wanted != IN_FULL:
        view = _view(view, from_original(arch, wanted, view.tensors), f"{ORIGINAL} layout of {arch.name}")
    return view


def _renamed(checkpoint: Checkpoint, arch: Arch, spelling: Spelling, names: Mapping[str, str]) -> Checkpoint:
    """A checkpoint with the names that are usual in its spelling, or those that ``names`` has for them."""
    usual = {key: usual_key(arch, spelling, key) for key in checkpoint.tensors}
    wanted = {names.get(name, name): key for key, name in usual.items()}
    same = all(name == key for name, key in wanted.items()) or len(wanted) < len(usual)
    return checkpoint if same else RenamedCheckpoint(checkpoint, wanted)


def _view(checkpoint: Checkpoint, conversion: Conversion, what: str) -> PiecedCheckpoint:
    if conversion.unknown:
        count = len(conversion.unknown)
        shown = ", ".join(conversion.unknown[:_SHOWN]) + (f" and {count - _SHOWN} more" if count > _SHOWN else "")
        raise OptionError(
            f"{count} of its keys are of no part that is known of the {what}, and would be lost: {shown}",
            hint="leave them out before: pick_component or omit_component",
        )
    return PiecedCheckpoint(checkpoint, conversion.tensors, tuple(conversion.left_out))


def in_original(given: Input) -> Checkpoint:
    """An input as a view in the original layout of its arch, with the usual names there; as it is without an arch.

    Raises `RemeltError` where it has keys that could not be told there.
    """
    arch = given.detection.arch
    if arch is None:
        return given.checkpoint
    return _renamed(respelled(given.checkpoint, arch, given.detection.spelling, IN_FULL), arch, IN_FULL, {})


def from_in_original(given: Input, view: Checkpoint, keys: Collection[str]) -> Checkpoint:
    """Those tensors of an input of which some part is one of ``keys`` of its view in the original layout.

    They have the input's own names, and are made of ``view``, which has the tensors of that.
    """
    arch = given.detection.arch
    if arch is None:
        return RenamedCheckpoint(view, {key: key for key in given.checkpoint.tensors if key in keys})
    spelling = given.detection.spelling
    made = from_original(arch, spelling, view.tensors).tensors
    found = {}
    for key in given.checkpoint.tensors:
        one = made.get(usual_key(arch, spelling, key))
        if one is not None and any(piece.key in keys for piece in one.pieces):
            found[key] = one
    return PiecedCheckpoint(view, found)
