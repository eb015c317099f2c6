"""Adapters of a recipe as differences of the model that they are added to, by its keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from remelt.adapters.checkpoint import ChangesCheckpoint, changes_of
from remelt.adapters.pairing import Layouts
from remelt.adapters.written import Written
from remelt.archs.detect import Detection
from remelt.archs.dialects import IN_FULL, ORIGINAL, Spelling, from_original, to_original
from remelt.check.inputs import Input
from remelt.core.dtype import DType
from remelt.errors import AdapterError, Problem
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.pieced import PiecedCheckpoint

_SHOWN = 5


class Changed:
    """A model that adapters change: its tensors in every dialect of its arch."""

    def __init__(self, base: Input) -> None:
        self.base = base
        arch, spelling = base.detection.arch, base.detection.spelling
        self.original: Checkpoint = base.checkpoint
        if arch is not None and spelling != IN_FULL:
            self.original = PiecedCheckpoint(
                base.checkpoint, to_original(arch, spelling, base.checkpoint.tensors).tensors
            )
        self.layouts = Layouts.of(arch, self.original.tensors)
        self._dialects: dict[str, Checkpoint] = {ORIGINAL: self.original}

    def in_dialect(self, dialect: str) -> Checkpoint:
        """The model in a dialect."""
        if dialect not in self._dialects:
            arch = self.base.detection.arch
            assert arch is not None
            made = from_original(arch, Spelling(dialect), self.original.tensors).tensors
            self._dialects[dialect] = PiecedCheckpoint(self.original, made)
        return self._dialects[dialect]


def with_adapters(
    inputs: Mapping[int, Input],
    order: Sequence[int],
    bases: Mapping[int, Input],
    compute: DType,
    problems: list[Problem],
    *,
    ignore_unused: bool,
) -> dict[int, Input]:
    """The inputs, of which adapters are views of the differences that they make, spelled as the original dialect.

    What cannot be is a problem: no model to change, modules that it lacks, factors that do not fit.
    """
    found = dict(inputs)
    models = list(dict.fromkeys(index for index in order if inputs[index].adapter is None))
    models.sort(key=lambda index: inputs[index].model.space != "weight")
    weights = [index for index in models if inputs[index].model.space == "weight"]
    changed: dict[int, Changed] = {}
    own = Layouts.of_adapters()
    dtype = torch.float64 if compute is DType.F64 else torch.float32
    for index, given in inputs.items():
        if given.adapter is None:
            continue
        base = bases.get(index) or next((inputs[one] for one in models), None)
        try:
            if base is None:
                own.learn(given.checkpoint.tensors)
                view = changes_of(given.checkpoint, own, _no_model, dtype=dtype)
                found[index] = replace(given, checkpoint=view, detection=Detection(None, "an adapter by itself"))
                continue
            if id(base.checkpoint) not in changed:
                changed[id(base.checkpoint)] = Changed(base)
            whole = changed[id(base.checkpoint)]
            view = changes_of(
                given.checkpoint, whole.layouts, whole.in_dialect, dtype=dtype, ignore_unused=ignore_unused
            )
        except AdapterError as error:
            problems.append(Problem(given.label, error.message, error.hint, given.model.span))
            continue
        if index not in bases and len(weights) > 1 and view.checkpoint.needs_base:  # type: ignore[attr-defined]
            message = "multiplies a model's own weights, and the recipe has several models"
            hint = f'say of which: adapter("{given.model.name}", base="{base.model.name}")'
            problems.append(Problem(given.label, message, hint, given.model.span))
            continue
        evidence = f"an adapter of {base.label}"
        found[index] = replace(given, checkpoint=view, detection=Detection(base.detection.arch, evidence))
    return found


def first_adapter(given: Input) -> ChangesCheckpoint:
    """The changes that an adapter makes, which its view consists of."""
    view: Any = given.checkpoint
    while not isinstance(view, ChangesCheckpoint):
        view = view.checkpoint
    return view


def names_of(given: Input) -> Written:
    """How an adapter names its modules."""
    return Written.like(first_adapter(given).adapter)


def refuse_broken(inputs: Iterable[Input]) -> None:
    """Raise `AdapterError` where parts of adapters have NaN or infinities, with all of them: each is read once."""
    from remelt.engine.finite import is_finite

    broken = []
    for given in inputs:
        changes = first_adapter(given)
        parts = {id(entry.parts): entry.parts for entry in changes.entries.values()}.values()
        broken += [
            f"  {given.label}  {one.module}: {part}"
            for one in parts
            for part in one.infos
            if not is_finite(one.read(part))
        ]
    if broken:
        more = [f"  and {len(broken) - _SHOWN} more"] if len(broken) > _SHOWN else []
        raise AdapterError(
            "\n".join(["adapters have numbers that are not finite:", *broken[:_SHOWN], *more]),
            hint="their training failed, or their type cannot hold them: take other versions",
        )


def _no_model(dialect: str) -> Checkpoint:
    raise AdapterError("this kind of adapter multiplies a model's own weights", hint="name the model: base=")
