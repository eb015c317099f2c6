"""One vocabulary for several models: which tokens it has, and where the row of each token is in each model."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from remelt.api.layer_views import CONFIG, LayersCheckpoint
from remelt.archs.structure import infer
from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError, RecipeError
from remelt.formats.checkpoint import Checkpoint

TOKENIZER = "tokenizer.json"
_OTHER_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
"""What tells the tokens beside the file that is read: none of it is true once there are more."""
_TOKENIZER_FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *_OTHER_VOCABULARIES,
)
_CONFIGS = (CONFIG, "generation_config.json")
_LARGEST = 2**28
_SIZE = "vocab_size"
_EMBEDDING = re.compile(r"(?:^|[._/])(?:\w*emb\w*|wte|tok_\w*|shared|lm_head)\.weight$")
ZERO, MEAN = -1, -2
"""Where a row comes from, if not from one model: it is zeros, or the mean of all that have the token."""

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
        told = _json(file)
        model, added = told.get("model"), told.get("added_tokens", [])
        listed = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(listed, list):  # with a score each
            listed = {str(entry[0]): row for row, entry in enumerate(listed) if isinstance(entry, list) and entry}
        if not isinstance(listed, dict) or not isinstance(added, list):
            raise FormatError(f"{file} tells no tokens", hint="it has a mapping model.vocab, of tokens to rows")
        rows = dict(listed)
        if not all(isinstance(one, dict) and isinstance(one.get("content"), str) and "id" in one for one in added):
            raise FormatError(f"{file} has added tokens without a content and an id")
        rows.update({one["content"]: one["id"] for one in added})
        if not all(isinstance(token, str) and type(row) is int and row >= 0 for token, row in rows.items()):
            raise FormatError(f"{file} gives a token a row that is no whole number")
        last = max((row for token, row in rows.items() if token not in listed), default=-1)
        ordered = dict(sorted(rows.items(), key=lambda entry: entry[1]))
        return cls(file, told, ordered, max(len(listed), last + 1))


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

    @classmethod
    def of(cls, first: Tokens, base: Path | None, members: Sequence[Member], *, union: bool) -> SharedVocabulary:
        """The tokens of the first, and with ``union`` those of all members after them.

        Raises `RecipeError` for a tokenizer whose rows leave no place for more.
        """
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
        found: list[str | None] = [None] * max([own, *[row + 1 for row in rows.values()]])
        for token, row in rows.items():
            found[row] = token
        return cls(first, tuple(found), added, tuple(members), files.index(base) if base in files else -1)

    @functools.cached_property
    def rows(self) -> Numbers:
        """For each member and row here, the row there, or -1."""
        table = np.array([[member.row(token) for token in self.tokens] for member in self.members], dtype=np.int64)
        for place, member in enumerate(self.members):  # rows of no token stay where they are
            if member.tokens.file == self.first.file:
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
        chosen = np.where(count == 1, present.argmax(0), np.where(count == 0, ZERO, MEAN))
        for one in (self.preferred, place):  # the own row before the base's
            if one in having:
                chosen = np.where(present[having.index(one)], having.index(one), chosen)
        row = np.take_along_axis(table, np.maximum(chosen, 0)[None], 0)[0]
        return np.where(chosen >= 0, np.array(having)[np.maximum(chosen, 0)], chosen), np.where(chosen >= 0, row, 0)

    def rows_of(self, number: int, key: str) -> list[tuple[Member, int]]:
        """The members that have what stands in a row of a tensor, and their rows of it."""
        found = zip(self.members, self.rows[:, number].tolist(), strict=True)
        return [(member, row) for member, row in found if row >= 0 and key in member.keys]

    def tokenizer(self) -> bytes:
        """The first tokenizer with the added tokens, as a file."""
        told = dict(self.first.told)
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        told["added_tokens"] = [
            *told.get("added_tokens", []),
            *[{"id": row, "content": token, **self._settings(token, plain)} for token, row in self.added.items()],
        ]
        return (json.dumps(told, ensure_ascii=False, indent=2) + "\n").encode()

    def _settings(self, token: str, otherwise: Mapping[str, Any]) -> dict[str, Any]:
        """How a token is looked for in a text, as the first tokenizer says that has it by itself."""
        for member in self.members:
            for one in member.tokens.told.get("added_tokens", []):
                if one.get("content") == token:
                    return {name: one.get(name, value) for name, value in otherwise.items()}
        return dict(otherwise)


def with_vocabulary(
    companions: Sequence[tuple[Path | bytes, str]], shared: SharedVocabulary
) -> list[tuple[Path | bytes, str]]:
    """The small files beside a result with the vocabulary's tokenizer, and a configuration that tells its size."""
    folder = shared.first.file.parent
    found: list[tuple[Path | bytes, str]] = [one for one in companions if one[1] not in _TOKENIZER_FILES]
    for name in _TOKENIZER_FILES:
        if name == TOKENIZER:
            found.append((shared.tokenizer() if shared.added else shared.first.file, name))
        elif (folder / name).is_file() and not (shared.added and name in _OTHER_VOCABULARIES):
            found.append((folder / name, name))
    told = {name: _json(folder / name) if (folder / name).is_file() else {} for name in _CONFIGS}
    return [(_configured(content, told[name], shared) if name in told else content, name) for content, name in found]


def _configured(content: Path | bytes, base: Mapping[str, Any], shared: SharedVocabulary) -> bytes:
    """A configuration with the vocabulary's size, and the rows of the special tokens that the base has."""
    told = json.loads(content if isinstance(content, bytes) else content.read_text(encoding="utf-8"))
    pending: list[Any] = [told]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            pending += one.values()
            if type(one.get(_SIZE)) is int:
                one[_SIZE] = len(shared.tokens)
    if isinstance(told, dict):
        told.update({name: base[name] for name in told if name.endswith("_token_id") and name in base})
    return (json.dumps(told, indent=2) + "\n").encode()


def _has_rows(key: str, info: TensorInfo, size: int) -> bool:
    return info.shape[:1] == (size,) and (len(info.shape) == 2 or key.endswith(".bias"))


def _size(config: Path, outside: Mapping[str, TensorInfo]) -> int:
    """How many rows for tokens a model has: as its configuration says, or as its embedding has."""
    told = _json(config) if config.is_file() else {}
    pending: list[Any] = [told]
    while pending:
        one = pending.pop(0)
        if isinstance(one, dict):
            if type(one.get(_SIZE)) is int:
                return int(one[_SIZE])
            pending += one.values()
    return max((info.shape[0] for key, info in outside.items() if info.shape and _EMBEDDING.search(key)), default=0)


def _json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _LARGEST:
        raise FormatError(f"{file} is larger than any tokenizer")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is no JSON: {error}") from None
    if not isinstance(told, dict):
        raise FormatError(f"{file} is no JSON object")
    return told
