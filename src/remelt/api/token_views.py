"""A model whose rows for tokens are in the order of a vocabulary: gathered where they are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from remelt.api.vocabulary import MEAN, ZERO, Member, Numbers, SharedVocabulary
from remelt.core.dtype import DType
from remelt.errors import RecipeError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.renamed import RenamedCheckpoint


class TokenAlignedCheckpoint(Checkpoint):
    """An opened checkpoint with some tensors' rows in another order; it is closed by whoever opened it.

    ``place`` says which member of the vocabulary it is. Raises `RecipeError` where rows differ in width.
    """

    def __init__(self, checkpoint: Checkpoint, shared: SharedVocabulary, place: int) -> None:
        self.checkpoint, self.shared, self.place = checkpoint, shared, place
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        member = shared.members[place]
        self.tensors = dict(checkpoint.tensors)
        self.runs: dict[str, _Runs] = {}
        for key in () if shared.is_own(place) else sorted(member.keys & set(checkpoint.tensors)):
            info = checkpoint.tensors[key]
            for other in shared.members:
                if key in other.keys and other.checkpoint.tensors[key].shape[1:] != info.shape[1:]:
                    raise RecipeError(
                        f"{key} has rows of {list(info.shape[1:])} in {member.label}, "
                        f"but of {list(other.checkpoint.tensors[key].shape[1:])} in {other.label}"
                    )
            runs = _Runs(*shared.sources(place, key))
            if not runs.is_whole(place, info.shape[0]):
                self.runs[key] = runs
                self.tensors[key] = replace(info, shape=(len(shared.tokens), *info.shape[1:]))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a tensor: as they lie, or gathered by rows."""
        if key not in self.runs:
            return self.checkpoint.read(key, start, stop)
        info = self.tensors[key]
        stop = info.nbytes if stop is None else min(stop, info.nbytes)
        if start >= stop:
            return memoryview(b"")
        width = info.nbytes // info.shape[0]
        first, last = start // width, -(-stop // width)
        gathered = bytearray((last - first) * width)
        for begin, end, source, row in self.runs[key].within(first, last):
            into = memoryview(gathered)[(begin - first) * width : (end - first) * width]
            if source == MEAN:
                for number in range(begin, end):
                    place = (number - begin) * width
                    into[place : place + width] = self._mean(key, number, info.dtype)
            elif source != ZERO:
                into[:] = _rows(self.shared.members[source], key, row, row + end - begin, info.dtype)
        return memoryview(gathered)[start - first * width : stop - first * width]

    def _mean(self, key: str, number: int, dtype: DType) -> bytes:
        """The mean of the rows of all models that have the token."""
        import torch

        from remelt.tensors import TORCH, bytes_of, tensor_over

        rows = [
            tensor_over(_rows(member, key, row, row + 1, DType.F64), DType.F64)
            for member, row in self.shared.rows_of(number, key)
        ]
        mean = torch.stack(rows).mean(0)
        return bytes(bytes_of(mean.to(TORCH[dtype])))

    def is_view(self, key: str) -> bool:
        """As the tensor's own, where its rows stay."""
        return key not in self.runs and self.checkpoint.is_view(key)

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """As the tensor's own, where its rows stay."""
        return None if key in self.runs else self.checkpoint.part(key, start, stop)

    def position(self, key: str) -> tuple[int, int]:
        """Where the tensor lies."""
        return self.checkpoint.position(key)

    def files(self) -> tuple[Path, ...]:
        """All files of the checkpoint."""
        return self.checkpoint.files()

    def view_of(self) -> str:
        """The rows that are told, as a digest."""
        digest = hashlib.sha256(json.dumps(self.shared.tokens).encode())
        digest.update(self.shared.rows.tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing: the checkpoint is not this view's."""


def shared_vocabulary(checkpoint: Checkpoint) -> SharedVocabulary | None:
    """The vocabulary in whose order a checkpoint, or what it is a view of, has its rows."""
    while not isinstance(checkpoint, TokenAlignedCheckpoint):
        if not isinstance(checkpoint, RenamedCheckpoint):
            return None
        checkpoint = checkpoint.checkpoint
    return checkpoint.shared


class _Runs:
    """Where rows come from, those that follow one another there together."""

    def __init__(self, source: Numbers, row: Numbers) -> None:
        follows = (source[1:] == source[:-1]) & ((row[1:] == row[:-1] + 1) | (source[1:] < 0))
        self.begins = np.flatnonzero(np.concatenate(([True], ~follows)))
        self.source, self.row, self.size = source[self.begins], row[self.begins], len(source)

    def is_whole(self, place: int, size: int) -> bool:
        """Whether the rows are a tensor's own, as they are."""
        return len(self.begins) == 1 and self.size == size and (int(self.source[0]), int(self.row[0])) == (place, 0)

    def within(self, first: int, last: int) -> list[tuple[int, int, int, int]]:
        """The rows from ``first`` to ``last``: where each run begins and ends, its source, and its first row there."""
        found = []
        number = int(np.searchsorted(self.begins, first, side="right")) - 1
        while number < len(self.begins) and self.begins[number] < last:
            begin = int(self.begins[number])
            end = int(self.begins[number + 1]) if number + 1 < len(self.begins) else self.size
            inside, until = max(begin, first), min(end, last)
            found.append((inside, until, int(self.source[number]), int(self.row[number]) + inside - begin))
            number += 1
        return found


def _rows(member: Member, key: str, first: int, last: int, dtype: DType) -> memoryview:
    """Some rows of a member's tensor, in an element type."""
    info = member.checkpoint.tensors[key]
    width = info.nbytes // info.shape[0]
    data = member.checkpoint.read(key, first * width, last * width)
    if info.dtype is dtype:
        return data
    from remelt.tensors import TORCH, bytes_of, tensor_over

    return bytes_of(tensor_over(data, info.dtype).to(TORCH[dtype]))
