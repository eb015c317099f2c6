"""A model whose rows for tokens are in the order of a vocabulary: gathered where they are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np

from remelt.api.vocabulary import ALL_MEAN, NO_ROW, OWN, Member, Numbers, SharedVocabulary
from remelt.core.dtype import DType
from remelt.errors import RecipeError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.renamed import RenamedCheckpoint

_AT_ONCE = 2**24
"""Bytes of rows that are held at once where the mean of many is computed."""


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
        self.means: dict[str, bytes] = {}
        self.lock = Lock()
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
            if source == ALL_MEAN:
                for number in range(begin, end):
                    place = (number - begin) * width
                    into[place : place + width] = self._mean(key, number, info.dtype)
            elif source == OWN:
                into[:] = self._own_mean(key) * (end - begin)
            elif source != NO_ROW:
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

    def _own_mean(self, key: str) -> bytes:
        """The mean of the rows that the model has for its own tokens, found at the first row that needs it."""
        with self.lock:
            if key not in self.means:
                self.means[key] = _mean_of_rows(self.shared.members[self.place], key)
            return self.means[key]

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
        digest.update(self.checkpoint.view_of().encode())
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


def _mean_of_rows(member: Member, key: str) -> bytes:
    """The mean of a tensor's rows that have a token, summed in float64 a few at a time."""
    import torch

    from remelt.tensors import TORCH, bytes_of, tensor_over

    info = member.checkpoint.tensors[key]
    used = np.zeros(info.shape[0], dtype=bool)
    used[[row for row in member.tokens.rows.values() if row < member.size]] = True
    step = max(1, _AT_ONCE // (8 * max(1, info.nbytes // info.dtype.itemsize // info.shape[0])))
    total = torch.zeros(info.shape[1:], dtype=torch.float64).reshape(-1)
    for first in range(0, info.shape[0], step):
        last = min(first + step, info.shape[0])
        rows = tensor_over(_rows(member, key, first, last, DType.F64), DType.F64).reshape(last - first, -1)
        total += rows[torch.from_numpy(used[first:last])].sum(0)
    return bytes(bytes_of((total / max(1, int(used.sum()))).to(TORCH[info.dtype])))


def _rows(member: Member, key: str, first: int, last: int, dtype: DType) -> memoryview:
    """Some rows of a member's tensor, in an element type."""
    info = member.checkpoint.tensors[key]
    width = info.nbytes // info.shape[0]
    data = member.checkpoint.read(key, first * width, last * width)
    if info.dtype is dtype:
        return data
    from remelt.tensors import TORCH, bytes_of, tensor_over

    return bytes_of(tensor_over(data, info.dtype).to(TORCH[dtype]))
