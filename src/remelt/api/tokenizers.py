"""The files beside a result of one vocabulary: its tokenizer, and configurations whose numbers are rows of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from remelt.api.configurations import CONFIG, Companion, parts_of, read_json, written
from remelt.api.vocabulary import TOKENIZER, Member, SharedVocabulary

_OTHER_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
"""What tells the tokens beside the file that is read: none of it is true once there are more."""
_TOKENIZER_FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *_OTHER_VOCABULARIES,
)
_GENERATION = "generation_config.json"
_CONFIGS = (CONFIG, _GENERATION)
_SIZE = "vocab_size"
_ONE, _SEVERAL = ("_token_id", "_token_index"), ("_token_id", "_token_ids", "suppress_tokens")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def with_vocabulary(companions: Sequence[Companion], shared: SharedVocabulary, own: Path | None) -> list[Companion]:
    """The small files beside a result with the vocabulary's tokenizer, and configurations that go by its rows.

    ``own`` is the folder that the configurations are from.
    """
    folder = shared.first.file.parent
    found: list[Companion] = [one for one in companions if one[1] not in _TOKENIZER_FILES]
    for name in _TOKENIZER_FILES:
        if name == TOKENIZER:
            found.append((tokenizer_of(shared) if shared.added else shared.first.file, name))
        elif (folder / name).is_file() and not (shared.added and name in _OTHER_VOCABULARIES):
            found.append((folder / name, name))
    told = {name: read_json(folder / name) if (folder / name).is_file() else {} for name in _CONFIGS}
    of_own = next((member for member in shared.members if own is not None and member.tokens.file.parent == own), None)
    return [
        (_configured(content, told[name], shared, of_own), name) if name in told else (content, name)
        for content, name in found
    ]


def tokenizer_of(shared: SharedVocabulary) -> bytes:
    """The first tokenizer with the added tokens, as a file.

    Tokens that other models look for as they stand in a text are looked for here, too. Those that they make of the
    pieces of a word become such here; they would else be cut out of any word that has those letters.
    """
    first = shared.first
    told = {**first.told, "model": dict(first.told["model"])}
    as_they_stand = {token: _settings(token, shared.members) for token in shared.added}
    plain = {token: row for token, row in shared.added.items() if as_they_stand[token] is None}
    if plain:
        _add_pieces(told["model"], {**first.rows, **shared.added}, plain, shared.members)
    looked_for = [(token, found) for token, found in as_they_stand.items() if found is not None]
    more = [{"id": shared.added[token], "content": token, **found} for token, found in looked_for]
    told["added_tokens"] = [*told.get("added_tokens", []), *more]
    return (json.dumps(told, ensure_ascii=False, indent=2) + "\n").encode()


def _settings(token: str, members: Iterable[Member]) -> dict[str, Any] | None:
    """How a token is looked for in a text, as the first tokenizer says that adds it; None where none does."""
    for member in members:
        one = member.tokens.added.get(token)
        if one is not None:
            return {name: one.get(name, value) for name, value in _PLAIN.items()}
    return None


def _add_pieces(
    model: dict[str, Any], rows: Mapping[str, int], plain: Mapping[str, int], members: Sequence[Member]
) -> None:
    """Have a tokenizer's model know pieces of words, with what makes them of smaller ones, and all other tokens.

    What a model does not know has the next free row when the tokenizer is loaded, whatever the file says.
    """
    if isinstance(model["vocab"], list):  # with a score each, by row
        scores: dict[str, float] = {}
        for member in members:
            listed = member.tokens.told["model"]["vocab"]
            scores.update({str(one[0]): one[1] for one in listed if str(one[0]) not in scores})
        by_row = {row: token for token, row in rows.items()}
        own = [list(one) for one in model["vocab"]]
        model["vocab"] = own + [_scored(by_row, scores, row) for row in range(len(own), max(by_row) + 1)]
        return
    model["vocab"] = dict(sorted(rows.items(), key=lambda entry: entry[1]))
    if "merges" not in model:
        return
    known = {"".join(_pair(merge)) for merge in model["merges"]}
    as_texts = all(isinstance(merge, str) for merge in model["merges"])
    more: list[Any] = []
    for member in members:
        for merge in member.tokens.told["model"].get("merges", []):
            left, right = _pair(merge)
            if left + right in plain and left + right not in known and left in rows and right in rows:
                known.add(left + right)
                more.append(f"{left} {right}" if as_texts and model["merges"] else [left, right])
    model["merges"] = [*model["merges"], *more]


def _scored(by_row: Mapping[int, str], scores: Mapping[str, float], row: int) -> list[Any]:
    """A piece with its score; what stands in no model's list is found as it is, whatever its score."""
    token = by_row.get(row, f"<unused row {row}>")
    return [token, scores.get(token, 0.0)]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return str(left), str(right)


def _configured(content: Path | bytes, base: Mapping[str, Any], shared: SharedVocabulary, own: Member | None) -> bytes:
    """A configuration with the vocabulary's size, and the rows of special tokens.

    Those that the tokenizer's own model tells are taken from there; of others the rows are those of the same tokens.
    """
    told = read_json(content)
    rows = {**shared.first.rows, **shared.added}
    by_row = {} if own is None else {row: token for token, row in own.tokens.rows.items()}
    same = own is None or own.tokens.rows == shared.first.rows

    def moved(row: Any) -> Any:
        return row if same or type(row) is not int or row < 0 else rows.get(by_row.get(row, ""))

    for one in parts_of(told):
        if type(one.get(_SIZE)) is int:
            one[_SIZE] = len(shared.tokens)
        for name, value in one.items():
            if one is told and name in base and name.endswith(_ONE):
                one[name] = base[name]
            elif isinstance(value, list) and name.endswith(_SEVERAL):
                one[name] = [row for row in map(moved, value) if row is not None] or None
            elif name.endswith(_ONE):
                one[name] = moved(value)
    return written(told)
