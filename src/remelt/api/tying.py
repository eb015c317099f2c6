"""Language models whose output head is their embedding, beside others that have a head of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from remelt.check.bound import BoundGraph
from remelt.check.inputs import Input
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.renamed import RenamedCheckpoint

TIED = "tie_word_embeddings"
HEAD = "lm_head.weight"
_USUAL = ((HEAD, "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "transformer.wte.weight"),)
_TIED_UNLESS_TOLD = ("gemma", "cohere")
"""Kinds of models, by the beginning of their name, whose configuration tells only that they are not tied."""


class HeadedCheckpoint(RenamedCheckpoint):
    """An opened checkpoint whose embedding is told as its output head, too."""

    def __init__(self, checkpoint: Checkpoint, head: str, embedding: str) -> None:
        super().__init__(checkpoint, {key: key for key in checkpoint.tensors} | {head: embedding})
        self.head, self.embedding = head, embedding

    def view_of(self) -> str:
        """Which tensor the head is: a configuration says so, which is none of the files."""
        return json.dumps([self.head, self.embedding, self.checkpoint.view_of()])


@dataclass
class Heads:
    """What was settled about output heads, for each result by its root."""

    untied: set[int] = field(default_factory=set)
    """Results of models of both kinds: they have a head of their own."""
    hidden: dict[int, frozenset[str]] = field(default_factory=dict)
    """Heads that tied models have in their files, but their result's first model has not."""


@dataclass(frozen=True)
class _Ends:
    """The names of a language model's head and embedding, and whether they are one tensor."""

    head: str
    embedding: str
    tied: bool
    stored: bool
    """Whether its file has the head."""


def settle_heads(graph: BoundGraph, inputs: dict[int, Input]) -> Heads:
    """Have every tied model that meets one with a head tell its embedding as its head; ``inputs`` is changed.

    Results of tied models alone have a head where their first model's file has one.
    """
    ends = {index: found for index, given in inputs.items() if (found := _ends(given)) is not None}
    settled = Heads()
    for root in graph.roots:
        own = [index for index in graph.models_of(root) if index in ends] if root >= 0 else []
        tied = [index for index in own if ends[index].tied]
        if not tied:
            continue
        if len(tied) < len(own):
            settled.untied.add(root)
        elif not ends[own[0]].stored:
            settled.hidden[root] = frozenset(ends[index].head for index in own)
            continue
        for index in tied:
            _tell_head(inputs, index, ends[index])
    return settled


def without(inputs: Mapping[int, Input], hidden: frozenset[str]) -> dict[int, Input]:
    """The inputs without some keys."""
    found = dict(inputs)
    for index, given in inputs.items():
        kept = {key: key for key in given.checkpoint.tensors if key not in hidden}
        if len(kept) < len(given.checkpoint.tensors):
            found[index] = replace(given, checkpoint=RenamedCheckpoint(given.checkpoint, kept))
    return found


def _tell_head(inputs: dict[int, Input], index: int, ends: _Ends) -> None:
    given = inputs[index]
    if not isinstance(given.checkpoint, HeadedCheckpoint):
        view = HeadedCheckpoint(given.checkpoint, ends.head, ends.embedding)
        inputs[index] = replace(given, checkpoint=view)


def _ends(given: Input) -> _Ends | None:
    """The ends of a model; None where it has no embedding, or no head though its configuration says it is not tied."""
    if given.model.space != "weight" or given.adapter is not None:
        return None
    arch, tensors = given.detection.arch, given.checkpoint.tensors
    for head, *embeddings in (*(() if arch is None else arch.tied), *_USUAL):
        embedding = next((name for name in embeddings if name in tensors), None)
        if embedding is None or not head.endswith(HEAD):
            continue
        says = _says_tied(given.checkpoint.path)
        if head in tensors:
            return _Ends(head, embedding, says is True, True)
        return None if says is False else _Ends(head, embedding, True, False)
    return None


def _says_tied(path: Path | None) -> bool | None:
    """Whether the configuration in a model's folder says that it is tied; None where it says nothing."""
    file = None if path is None or not path.is_dir() else path / "config.json"
    if file is None or not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None  # what a configuration must be is told where it is used
    parts = [one for one in (told, *_parts(told)) if isinstance(one, dict)]
    said = next((one[TIED] for one in parts if isinstance(one.get(TIED), bool)), None)
    if said is None and any(str(one.get("model_type", "")).startswith(_TIED_UNLESS_TOLD) for one in parts):
        return True
    return said


def _parts(told: Any) -> Iterable[Any]:
    """The configurations of parts, such as ``text_config``."""
    return (value for name, value in told.items() if name.endswith("_config")) if isinstance(told, dict) else ()
