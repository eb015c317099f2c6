"""One vocabulary for several models: which tokens it has, and where the row of each token is in each model."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remelt.api.configurations import CONFIG, parts_of, read_json
from remelt.api.layer_views import LayersCheckpoint
from remelt.archs.structure import infer
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError, RecipeError
from remelt.formats.checkpoint import Checkpoint
from remelt.recipe.vocabulary import OWN_MEAN, THEIRS, ZERO

TOKENIZER = "tokenizer.json"
_SIZE = "vocab_size"
_EMBEDDING = re.compile(r"(?:^|[._/])(?:\w*emb\w*|wte|tok_\w*|shared|lm_head)\.weight$")
NO_ROW, ALL_MEAN, OWN = -1, -2, -3
"""Where a row comes from, if not from one model: it is zeros, the mean of all that have it, or of the model's own."""
_BEGINNINGS = ("\u0120", "\u2581", "##")
"""How kinds of tokenizers mark where a word begins, or goes on; a share of a vocabulary has the mark."""
_SHARE = 50

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a model: the row of each, and the file that says so."""

    file: Path
    told: dict[str, Any]
    rows: dict[str, int]
    """Tokens in the order of their rows."""
    next_row: int
    """Which row the tokenizer gives to the next token that is added."""
    added: Mapping[str, Mapping[str, Any]]
    """Those that are looked for in a text as they are, with their settings."""

    @property
    def kind(self) -> str:
        """How words become tokens: BPE, WordPiece, Unigram, WordLevel."""
        return str(self.told["model"].get("type", "")) or "BPE"

    @functools.cached_property
    def mark(self) -> tuple[str, int] | None:
        """What a word's first or further tokens begin with, and how many do so; None where too few tell."""
        own = [token for token in self.rows if token not in self.added]
        counts = {mark: sum(token.startswith(mark) for token in own) for mark in _BEGINNINGS}
        most = max(counts, key=lambda mark: counts[mark])
        return (most, counts[most]) if counts[most] * _SHARE > len(own) else None

    @classmethod
    def read(cls, checkpoint: Path | None, label: str) -> Tokens:
        """The tokens of the model at a path, from the ``tokenizer.json`` beside its weights.

        Raises `RecipeError` where there is none, `FormatError` for one that is malformed.
        """
        file = None if checkpoint is None else tokenizer_of(checkpoint)
        if file is None or not file.is_file():
            raise RecipeError(
                f"{label} has no {TOKENIZER} beside its weights, so that its tokens are not known",
                hint="AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes one",
            )
        told = read_json(file)
        model, added = told.get("model"), told.get("added_tokens", [])
        listed = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(listed, list):  # with a score each
            listed = {str(entry[0]): row for row, entry in enumerate(listed) if isinstance(entry, list) and entry}
        if not isinstance(listed, dict) or not isinstance(added, list):
            raise FormatError(f"{file} tells no tokens", hint="it has a mapping model.vocab, of tokens to rows")
        rows = dict(listed)
        if not all(isinstance(one, dict) and isinstance(one.get("content"), str) and "id" in one for one in added):
            raise FormatError(f"{file} has added tokens without a content and an id")
        special = {one["content"]: one for one in added}
        rows.update({token: one["id"] for token, one in special.items()})
        if not all(isinstance(token, str) and type(row) is int and row >= 0 for token, row in rows.items()):
            raise FormatError(f"{file} gives a token a row that is no whole number")
        last = max((row for token, row in rows.items() if token not in listed), default=-1)
        ordered = dict(sorted(rows.items(), key=lambda entry: entry[1]))
        return cls(file, told, ordered, max(len(listed), last + 1), special)


def tokenizer_of(checkpoint: Path) -> Path:
    """Where the tokenizer of a folder, or of a file in one, stands."""
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / TOKENIZER


@dataclass(frozen=True)
class Member:
    """A model whose rows are put in order: its own tensors, its tokens, and which tensors have a row for each."""

    label: str
    checkpoint: Checkpoint
    tokens: Tokens
    size: int
    """Rows for tokens that it has; a tokenizer may tell more."""
    keys: frozenset[str]

    @classmethod
    def of(cls, label: str, checkpoint: Checkpoint) -> Member:
        """The member that a model is, or `RecipeError` where it has no rows for tokens."""
        if isinstance(checkpoint, LayersCheckpoint):  # of some layers: all its rows are told, whichever part is read
            checkpoint = checkpoint.checkpoint
        tokens = Tokens.read(checkpoint.path, label)
        stacks = infer(checkpoint.tensors).places
        outside = {key: info for key, info in checkpoint.tensors.items() if stacks[key].stack is None}
        size = _size(tokens.file.parent / CONFIG, outside)
        keys = frozenset(key for key, info in outside.items() if size and _has_rows(key, info, size))
        if not keys:
            raise RecipeError(
                f"{label} has no tensor with a row for each of its {size or len(tokens.rows)} tokens",
                hint=f"its {CONFIG} tells how many it has, as {_SIZE}",
            )
        return cls(label, checkpoint, tokens, size, keys)

    def row(self, token: str | None) -> int:
        """Where a token's row is, or -1."""
        row = -1 if token is None else self.tokens.rows.get(token, -1)
        return row if row < self.size else -1


@dataclass(frozen=True)
class SharedVocabulary:
    """The tokens that a result has, and the members that it is made of."""

    first: Tokens
    """The tokenizer of the result, but for what is added."""
    tokens: tuple[str | None, ...]
    """By row; None where no token has that row, as where a model has more rows than tokens."""
    added: Mapping[str, int]
    """Those that the first tokenizer does not have, with their rows."""
    members: tuple[Member, ...]
    preferred: int
    """Which member is the base, or -1."""
    new_rows: str = THEIRS

    @classmethod
    def of(
        cls,
        first: Tokens,
        base: Path | None,
        members: Sequence[Member],
        *,
        union: bool,
        new_rows: str = THEIRS,
        multiple: int | None = None,
    ) -> SharedVocabulary:
        """The tokens of the first, and with ``union`` those of all members after them.

        There are as many rows as the first has, or the least ``multiple`` that holds all. Raises `RecipeError` for
        tokens that cannot be told to be the same, and for a tokenizer whose rows leave no place for more.
        """
        _refuse_other_words(first, members, union=union)
        files = [member.tokens.file for member in members]
        known = set(first.rows)
        more: list[str] = []
        for member in members if union else ():
            for token in member.tokens.rows:
                if token not in known and member.row(token) >= 0:
                    known.add(token)
                    more.append(token)
        if more and first.next_row <= max(first.rows.values(), default=-1):
            raise RecipeError(
                f"{first.file} leaves rows free between its tokens, so that no more can follow", hint='order="base"'
            )
        added = {token: first.next_row + place for place, token in enumerate(more)}
        rows = {**first.rows, **added}
        own = members[files.index(first.file)].size if first.file in files else 0
        needed = max([0, *[row + 1 for row in rows.values()]])
        size = max(own, needed) if multiple is None else -(-needed // multiple) * multiple
        found: list[str | None] = [None] * size
        for token, row in rows.items():
            found[row] = token
        preferred = files.index(base) if base in files else -1
        return cls(first, tuple(found), added, tuple(members), preferred, new_rows)

    @functools.cached_property
    def rows(self) -> Numbers:
        """For each member and row here, the row there, or -1."""
        table = np.array([[member.row(token) for token in self.tokens] for member in self.members], dtype=np.int64)
        for place, member in enumerate(self.members):  # rows of no token stay where they are
            if member.tokens.rows == self.first.rows:
                free = [row for row, token in enumerate(self.tokens) if token is None and row < member.size]
                table[place, free] = free
        return table

    def is_own(self, place: int) -> bool:
        """Whether a member has that vocabulary already, in that order."""
        member = self.members[place]
        return not self.added and member.size == len(self.tokens) and member.tokens.rows == self.first.rows

    def sources(self, place: int, key: str) -> tuple[Numbers, Numbers]:
        """For each row of a member's tensor: the member that it is taken from, and its row there."""
        having = [one for one, member in enumerate(self.members) if key in member.keys]
        table = self.rows[having]
        present = table >= 0
        count = present.sum(0)
        theirs = np.where(count == 1, present.argmax(0), np.where(count == 0, NO_ROW, ALL_MEAN))
        padding = np.array([token is None for token in self.tokens], dtype=bool)
        if self.new_rows == ZERO:
            chosen = np.where(padding, theirs, NO_ROW)
        elif self.new_rows == OWN_MEAN:
            chosen = np.where(padding, theirs, OWN)
        else:
            chosen = theirs
        chosen = np.where(padding & (count == 0), OWN, chosen)
        own_last = (self.preferred, place) if self.new_rows == THEIRS else (place,)
        for one in own_last:  # which so goes before the base's
            if one in having:
                chosen = np.where(present[having.index(one)], having.index(one), chosen)
        row = np.take_along_axis(table, np.maximum(chosen, 0)[None], 0)[0]
        return np.where(chosen >= 0, np.array(having)[np.maximum(chosen, 0)], chosen), np.where(chosen >= 0, row, 0)

    def rows_of(self, number: int, key: str) -> list[tuple[Member, int]]:
        """The members that have what stands in a row of a tensor, and their rows of it."""
        found = zip(self.members, self.rows[:, number].tolist(), strict=True)
        return [(member, row) for member, row in found if row >= 0 and key in member.keys]


def _refuse_other_words(first: Tokens, members: Sequence[Member], *, union: bool) -> None:
    """Refuse vocabularies whose tokens mean other things, or that cannot be one tokenizer's."""
    remedy = "merge the layers alone, and take the embeddings of one model"
    label = next((member.label for member in members if member.tokens.file == first.file), str(first.file))
    for member in members:
        own = member.tokens
        if own.file == first.file:
            continue
        if first.mark is not None and own.mark is not None and own.mark[0] != first.mark[0]:
            facts = [
                f"{count} of {len(tokens.rows)} tokens of {name} begin with {mark!r}"
                for name, tokens, (mark, count) in ((label, first, first.mark), (member.label, own, own.mark))
            ]
            raise RecipeError(f"tokens of one spelling are not the same: {', but '.join(facts)}", hint=remedy)
        if not union and first.rows and not first.rows.keys() & own.rows.keys():
            raise RecipeError(f"{label} and {member.label} share no token", hint=remedy)
        strange = next((token for token in own.rows if token not in first.rows and token not in own.added), None)
        if union and own.kind != first.kind and strange is not None:
            raise RecipeError(
                f"a tokenizer of kind {first.kind}, as {label} has, cannot make tokens such as {strange!r} of "
                f"{member.label}, which is of kind {own.kind}",
                hint='order="base"',
            )


def _has_rows(key: str, info: TensorInfo, size: int) -> bool:
    return info.shape[:1] == (size,) and (len(info.shape) == 2 or key.endswith(".bias"))


def _size(config: Path, outside: Mapping[str, TensorInfo]) -> int:
    """How many rows for tokens a model has: as its configuration says, or as its embedding has."""
    told = read_json(config) if config.is_file() else {}
    said = next((one[_SIZE] for one in parts_of(told) if type(one.get(_SIZE)) is int), None)
    if said is not None:
        return int(said)
    return max((info.shape[0] for key, info in outside.items() if info.shape and _EMBEDDING.search(key)), default=0)
