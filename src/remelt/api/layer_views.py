"""Models of which a part of the layers is read: under other numbers, with a configuration that tells how many."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remelt.api.configurations import CONFIG, read_json, written
from remelt.api.layer_facts import layer_facts, tell_layers
from remelt.archs.structure import Structure, infer
from remelt.check.inputs import Input
from remelt.errors import RecipeError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.renamed import RenamedCheckpoint
from remelt.recipe.node import LayerRange

_BEFORE = re.compile(r"(?:^|[._/])(?:\w*emb\w*|wte|wpe|tok_\w*|patch_\w*|conv_in|img_in|txt_in|time_in)(?:[._]|$)")
"""Names of what comes before the layers; anything else outside them comes after."""
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class LayersCheckpoint(RenamedCheckpoint):
    """Some layers of an opened checkpoint: those of ``stack``, which has ``count`` of them."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], stack: str, count: int) -> None:
        super().__init__(checkpoint, names)
        self.stack, self.count = stack, count


def view_of_layers(checkpoint: Checkpoint, wanted: LayerRange, label: str) -> LayersCheckpoint:
    """Some layers of a checkpoint, under the numbers that they have in the result.

    Raises `RecipeError` where it has no such stack, or not so many layers.
    """
    structure = infer(checkpoint.tensors)
    stack = stack_of(structure, wanted.stack, label)
    numbers = structure.stacks[stack]
    if wanted.stop > len(numbers):
        raise RecipeError(
            f"{label} has {len(numbers)} layers in {stack}, but layers {wanted.start} to {wanted.stop} are asked for",
            hint=f"the last range of it ends at {len(numbers)}",
        )
    names: dict[str, str] = {}
    for key in checkpoint.tensors:
        place = structure.places[key]
        if place.stack != stack:
            if wanted.before if _BEFORE.search(key) else wanted.after:
                names[key] = key
        elif wanted.start <= place.index < wanted.stop:
            number = place.index - wanted.start + wanted.offset
            names[f"{stack}.{number}{key[len(stack) + 1 + len(str(place.number)) :]}"] = key
    return LayersCheckpoint(checkpoint, names, stack, len(numbers))


def stack_of(structure: Structure, named: str | None, label: str) -> str:
    """The stack that is meant: the one of that name, or the longest."""
    stacks = structure.stacks
    if named is not None:
        found = [stack for stack in stacks if stack == named or stack.endswith(f".{named}")]
        if len(found) == 1:
            return found[0]
        have = ", ".join(stacks) or "none"
        raise RecipeError(f"{label} has {len(found) or 'no'} stacks of layers named {named!r}", hint=f"it has {have}")
    if not stacks:
        raise RecipeError(f"{label} has no stack of layers: no numbered parts that resemble each other")
    return max(stacks, key=lambda stack: len(stacks[stack]))


def restacked(config: Path | bytes, parts: Sequence[Input]) -> bytes:
    """A configuration for a result whose layers are those of several parts: their number, and what is told of each.

    What is told of each layer is taken from the layer that stands there now, of the model that it is from. Raises
    `RecipeError` where the configuration's words cannot tell the result's layers.
    """
    told = read_json(config)
    whole = _layers_of(parts[0])
    described = _describing(told, whole.stack, whole.count)
    if described is None:
        return written(told)
    sources: dict[int, tuple[dict[str, Any], int]] = {}
    for given in parts:
        wanted = given.model.layers
        assert wanted is not None
        facts = _facts_of(given, described if given is parts[0] else None)
        for number in range(wanted.start, wanted.stop):
            sources.setdefault(number - wanted.start + wanted.offset, (facts, number))
    order = [sources[number] for number in sorted(sources)]
    first = layer_facts(described, whole.count)
    found = {name: [_told(facts, name, number, parts[0]) for facts, number in order] for name in first}
    tell_layers(described, found)
    for name in _COUNTS:
        if described.get(name) == whole.count:
            described[name] = len(order)
    return written(told)


def _facts_of(given: Input, described: dict[str, Any] | None) -> dict[str, Any]:
    """What a model's own configuration tells of each of its layers; nothing where it has none."""
    view = _layers_of(given)
    if described is None and view.path is not None and (view.path / CONFIG).is_file():
        described = _describing(read_json(view.path / CONFIG), view.stack, view.count)
    return {} if described is None else layer_facts(described, view.count)


def _told(facts: Mapping[str, Any], name: str, number: int, first: Input) -> Any:
    if name in facts:
        return facts[name][number]
    raise RecipeError(
        f"the configuration of {first.label} tells {name} of each layer, but that of another part does not",
        hint=f"give each model's folder a {CONFIG} that does",
    )


def refuse_strange_stacks(inputs: Sequence[Input]) -> None:
    """Refuse parts of one stack whose layers have other names: they would not follow one another."""
    named: dict[str | None, tuple[str, Input]] = {}
    for given in inputs:
        wanted = given.model.layers
        if wanted is None:
            continue
        name = _layers_of(given).stack
        first, other = named.setdefault(wanted.stack, (name, given))
        if name != first:
            raise RecipeError(
                f"the layers of {given.label} are named {name}, but those of {other.label} {first}: "
                "the layers of one stack are named alike",
                span=given.model.span,
            )


def _layers_of(given: Input) -> LayersCheckpoint:
    """The view of layers that an input is."""
    view = given.checkpoint
    while not isinstance(view, LayersCheckpoint):  # with its tokens in another order
        view = view.checkpoint  # type: ignore[attr-defined]
    return view


def _describing(told: dict[str, Any], stack: str, count: int) -> dict[str, Any] | None:
    """The part of a configuration that tells of a stack: the one with that number of layers whose name is nearest."""
    found: list[tuple[int, int, dict[str, Any]]] = []
    pending: list[tuple[tuple[str, ...], Any]] = [((), told)]
    words = set(re.split(r"[._]", stack))
    while pending:
        path, one = pending.pop(0)
        if not isinstance(one, dict):
            continue
        pending += [((*path, name), value) for name, value in one.items()]
        if any(one.get(name) == count for name in _COUNTS):
            shared = len(words & {word for name in path for word in name.split("_")})
            found.append((-shared, len(path), one))
    return min(found, key=lambda one: one[:2])[2] if found else None
