"""A checkpoint whose heads are rotated: a view that computes, in float32, the rows that are read, head by head."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from remelt.alignment.permutation import Rotations
from remelt.alignment.rotations import Turn
from remelt.formats.checkpoint import Checkpoint
from remelt.tensors import TORCH, bytes_of, tensor_over

_BLOCK = 64
"""Rows of which columns are rotated at once: always the same ones, so that no bit depends on what is read."""
_COPIES = 4
"""How often the rows of a head, and those of a block, are in memory while they are computed."""


class Turning(Protocol):
    """What is rotated in a model: known before it is read, or found out when it first is."""

    @property
    def keys(self) -> Collection[str]:
        """The tensors in which anything may be rotated."""

    @property
    def is_known(self) -> bool:
        """Whether it is known already what is rotated."""

    def of(self, key: str) -> Sequence[Turn]:
        """How the axes of a tensor are turned; none where it stays."""

    def told(self) -> str:
        """What decides it."""

    @property
    def held(self) -> int:
        """Bytes of the matrices, at most."""


class RotatedCheckpoint(Checkpoint):
    """An opened checkpoint of which the heads of some tensors are rotated; whoever opened it closes it.

    Numbers are computed in float32, those of float64 in float64, and rounded once to the tensor's type. They are the
    same whatever part of a tensor is read at a time.
    """

    def __init__(self, checkpoint: Checkpoint, turning: Turning) -> None:
        self.checkpoint, self.turning = checkpoint, turning
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self.inherited, self.quantised = checkpoint.inherited, checkpoint.quantised
        self.tensors = checkpoint.tensors
        self.scratch = max(checkpoint.scratch, 2**24)  # as of other products of matrices

    def _turns(self, key: str) -> Sequence[Turn]:
        return self.turning.of(key) if key in self.turning.keys else ()

    def _stays(self, key: str) -> bool:
        """Whether a tensor is known to be the other's own."""
        return key not in self.turning.keys or (self.turning.is_known and not self.turning.of(key))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a tensor: the rows that hold them are computed where anything is rotated."""
        turns, info = self._turns(key), self.tensors[key]
        stop = info.nbytes if stop is None else min(stop, info.nbytes)
        if not turns or start >= stop:
            return self.checkpoint.read(key, start, stop)
        rows = _Rows(self.checkpoint, key, turns)
        first, last = start // rows.width, -(-stop // rows.width)
        found = bytes_of(rows.rotated(first, last).to(TORCH[info.dtype]))
        return found[start - first * rows.width : stop - first * rows.width]

    def is_view(self, key: str) -> bool:
        """As the other's, where nothing is rotated."""
        return self._stays(key) and self.checkpoint.is_view(key)

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """As the other's, where nothing is rotated."""
        return self.checkpoint.part(key, start, stop) if self._stays(key) else None

    def beside(self, key: str, elements: int) -> int:
        """Those rows as they are computed, twice, and in their own type, and some times the rows of a head."""
        if key not in self.turning.keys:
            return self.checkpoint.beside(key, elements)
        info = self.tensors[key]
        width = math.prod(info.shape[1:])
        size = max(info.dtype.itemsize, 4)
        rows = min(elements + 2 * width, info.numel)
        block = min(max(_BLOCK, self._longest(key)) * width, info.numel)
        computed = rows * (2 * size + info.dtype.itemsize) + _COPIES * block * size
        return computed + self.checkpoint.beside(key, max(rows, block))

    def _longest(self, key: str) -> int:
        """The most rows that one head may have; all where that is not known yet."""
        if not self.turning.is_known:
            return self.tensors[key].shape[0]
        return max((turn.elements.shape[2] for turn in self._turns(key) if turn.axis == 0), default=1)

    @property
    def held(self) -> int:
        """The matrices, and what the other holds."""
        return self.checkpoint.held + self.turning.held

    def position(self, key: str) -> tuple[int, int]:
        """Where the tensor lies that is rotated."""
        return self.checkpoint.position(key)

    def files(self) -> tuple[Path, ...]:
        """All files of the checkpoint."""
        return self.checkpoint.files()

    def view_of(self) -> str:
        """What is rotated, and in what."""
        return f"rotated {self.turning.told()} {self.checkpoint.view_of()}"

    def close(self) -> None:
        """Nothing: the checkpoint is not this view's."""


class _Rows:
    """The rows of one tensor, turned: first along their own axes, in blocks, then among each other, head by head."""

    def __init__(self, checkpoint: Checkpoint, key: str, turns: Sequence[Turn]) -> None:
        self.checkpoint, self.key, self.info = checkpoint, key, checkpoint.tensors[key]
        self.exact = torch.float64 if TORCH[self.info.dtype] == torch.float64 else torch.float32
        self.down = [turn for turn in turns if turn.axis == 0]
        self.across = [turn for turn in turns if turn.axis > 0]
        self.count = self.info.shape[0]
        self.width = self.info.nbytes // self.count

    def rotated(self, first: int, last: int) -> torch.Tensor:
        """Rows as a matrix of the first axis against all others."""
        found = self._across(first, last)
        for turn in self.down:
            heads, queries, _ = turn.elements.shape
            for head in range(heads):
                for query in range(queries):
                    places = turn.elements[head, query]
                    inside = (places >= first) & (places < last)
                    if inside.any():
                        rows = torch.cat([self._across(low, high) for low, high in _runs(places)])
                        made = turn.matrices[head].to(self.exact) @ rows
                        found[places[inside] - first] = made[inside]
        return found

    def _across(self, first: int, last: int) -> torch.Tensor:
        """Rows of which the other axes alone are turned, to be written to."""
        if not self.across:
            return self._stored(first, last)
        begin = first // _BLOCK * _BLOCK
        blocks = [
            self._block(low, min(low + _BLOCK, self.count))[max(first - low, 0) : last - low]
            for low in range(begin, last, _BLOCK)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _block(self, low: int, high: int) -> torch.Tensor:
        found = self._stored(low, high).reshape(high - low, *self.info.shape[1:])
        for turn in self.across:
            heads, queries, size = turn.elements.shape
            view, places = found.movedim(turn.axis, 0), turn.elements.reshape(-1)
            channels = view[places].reshape(heads, queries, size, -1)
            turned = turn.matrices[:, None].to(self.exact) @ channels
            view[places] = turned.reshape(len(places), *view.shape[1:])
        return found.reshape(high - low, -1)

    def _stored(self, low: int, high: int) -> torch.Tensor:
        data = self.checkpoint.read(self.key, low * self.width, high * self.width)
        return tensor_over(data, self.info.dtype).to(self.exact, copy=True).reshape(high - low, -1)


def _runs(places: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Places as stretches of neighbours, in their order."""
    breaks = (torch.diff(places) != 1).nonzero().reshape(-1) + 1
    for one in torch.tensor_split(places, breaks.tolist()):
        yield int(one[0]), int(one[-1]) + 1


def digest_of(rotations: Rotations) -> str:
    """What rotations are, as a digest."""
    digest = hashlib.sha256()
    for name, levels in sorted(rotations.items()):
        for level, matrices in sorted(levels.items()):
            digest.update(f"{name}\0{level}\0{tuple(matrices.shape)}\0".encode("utf-8", "surrogatepass"))
            digest.update(bytes_of(matrices.float()))
    return digest.hexdigest()
