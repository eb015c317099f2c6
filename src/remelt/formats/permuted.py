"""A checkpoint with the elements of some axes in another order: a view, gathered row by row where it is read."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from remelt.core.tensor_info import TensorInfo
from remelt.formats.checkpoint import Checkpoint

Positions = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_NARROW = 512
"""Bytes below which what lies under one index of the last permuted axis is no line of its own, but a column."""
_WIDEST = 2**22
_AT_ONCE = 2**20
"""Bytes of lines that are gathered before their columns are."""
_SHORT = 2**14
"""Bytes of a line from which on each is copied by itself."""
_HELD = 32
"""Tensors whose positions are held."""


@dataclass(frozen=True)
class Gather:
    """Where the elements of one tensor come from: of ``source``, for each of ``axes`` which index comes to each place.

    Of a tensor whose first axis counts items, ``items`` says which item comes to each place, and ``within`` for each
    axis of an item, by the item's place, which index comes to each.
    """

    source: str
    axes: Mapping[int, Positions] = field(default_factory=dict)
    items: Positions | None = None
    within: Mapping[int, Positions] = field(default_factory=dict)

    @property
    def moved(self) -> tuple[int, ...]:
        """The axes of the tensor along which elements move."""
        found = {*self.axes, *(axis + 1 for axis in self.within), *(() if self.items is None else (0,))}
        return tuple(sorted(found))

    def sources(self, coordinates: Sequence[Positions]) -> list[Positions]:
        """The coordinates from which elements come to others, on as many of the first axes as are given."""
        found = [self.axes[axis][one] if axis in self.axes else one for axis, one in enumerate(coordinates)]
        for axis, rows in self.within.items():
            if axis + 1 < len(found):
                found[axis + 1] = rows[found[0], found[axis + 1]]
        if self.items is not None:
            found[0] = self.items[found[0]]
        return found

    def columns(self, axis: int, item: int) -> Positions | None:
        """Which index comes to each place of one axis, of one item if there are any; None where all stay."""
        column = self.axes.get(axis)
        if axis == 0 and self.items is not None:
            return self.items if column is None else np.asarray(self.items[column])
        rows = self.within.get(axis - 1)
        if rows is None:
            return column
        place = int(self.axes[0][item]) if 0 in self.axes else item
        row: Positions = rows[place]
        return row if column is None else np.asarray(row[column])


class Gathers(Protocol):
    """What moves in a model: known before it is read, or found out when it first is."""

    @property
    def keys(self) -> Collection[str]:
        """The tensors in which anything may move."""

    @property
    def is_known(self) -> bool:
        """Whether it is known already what moves."""

    def of(self, key: str) -> Gather:
        """Where the elements of a tensor come from."""

    def source(self, key: str) -> str:
        """The tensor that they come from, as far as that is known."""

    def told(self) -> str:
        """What decides it."""

    def files(self) -> tuple[Path, ...]:
        """The files that decide it."""


class PermutedCheckpoint(Checkpoint):
    """An opened checkpoint of which the axes of some tensors are permuted; whoever opened it closes it.

    What is read takes as much memory as it has bytes, up to whole rows, and as the other takes for it.
    """

    def __init__(self, checkpoint: Checkpoint, gathers: Gathers) -> None:
        self.checkpoint, self.gathers = checkpoint, gathers
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self.inherited, self.scratch = checkpoint.inherited, checkpoint.scratch
        names = dict.fromkeys((*checkpoint.tensors, *gathers.keys))
        sources = {key: gathers.source(key) if key in gathers.keys else key for key in names}
        self.tensors = {key: checkpoint.tensors[one] for key, one in sources.items() if one in checkpoint.tensors}
        self._lines = lru_cache(_HELD)(self._lines_of)

    def _lines_of(self, key: str) -> _Lines:
        gather = self.gathers.of(key)
        return _Lines(gather, self.checkpoint.tensors[gather.source], self.checkpoint)

    def _still(self, key: str) -> str | None:
        """The key of the tensor there that this one is; None where elements move, or may."""
        if key not in self.gathers.keys:
            return key
        if not self.gathers.is_known:
            return None
        lines = self._lines(key)
        return None if lines.gather.moved else lines.gather.source

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a tensor: as they lie where nothing moves, else gathered."""
        info = self.tensors[key]
        stop = info.nbytes if stop is None else min(stop, info.nbytes)
        if start >= stop:
            return memoryview(b"")
        if key not in self.gathers.keys:
            return self.checkpoint.read(key, start, stop)
        return self._lines(key).read(start, stop)

    def is_view(self, key: str) -> bool:
        """As the tensor's own, where nothing moves."""
        still = self._still(key)
        return still is not None and self.checkpoint.is_view(still)

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """As the tensor's own, where nothing moves."""
        still = self._still(key)
        return None if still is None else self.checkpoint.part(still, start, stop)

    def beside(self, key: str, elements: int) -> int:
        """The rows that hold those elements, some lines whose columns are gathered, and what the other takes."""
        info = self.tensors[key]
        beside = self.checkpoint.beside(self.gathers.source(key) if key in self.gathers.keys else key, elements)
        if key not in self.gathers.keys:
            return beside
        line = min(info.nbytes // max(info.shape[0] if len(info.shape) > 1 else 1, 1), _WIDEST)
        return beside + min(elements * info.dtype.itemsize, info.nbytes) + 4 * line + 2 * _AT_ONCE

    @property
    def held(self) -> int:
        """The positions of the tensors that were read last."""
        sizes = (_positions(self.tensors[key].shape) for key in self.gathers.keys if key in self.tensors)
        return self.checkpoint.held + sum(heapq.nlargest(_HELD, sizes)) * np.dtype(np.int64).itemsize

    def position(self, key: str) -> tuple[int, int]:
        """Where the tensor lies that it is gathered from."""
        return self.checkpoint.position(self.gathers.source(key) if key in self.gathers.keys else key)

    def files(self) -> tuple[Path, ...]:
        """All files of the checkpoint, and those that decide what moves."""
        return tuple(dict.fromkeys((*self.checkpoint.files(), *self.gathers.files())))

    def view_of(self) -> str:
        """What moves, and in what."""
        return f"permuted {self.gathers.told()} {self.checkpoint.view_of()}"

    def close(self) -> None:
        """Nothing: the checkpoint is not this view's."""


def _positions(shape: Sequence[int]) -> int:
    """How many positions a tensor of a shape may have, of its first axes."""
    stacked = shape[0] * sum(shape[1:3]) if len(shape) > 2 else 0
    return sum(shape) + stacked


class _Lines:
    """A tensor as lines, each of which lies in a row in another tensor, but for the order of its columns."""

    def __init__(self, gather: Gather, info: TensorInfo, checkpoint: Checkpoint) -> None:
        self.gather, self.info, self.checkpoint = gather, info, checkpoint
        moved, shape, size = gather.moved, info.shape, info.dtype.itemsize
        self.last = moved[-1] if moved else 0
        self.inner = math.prod(shape[self.last + 1 :]) * size
        self.has_columns = bool(moved) and self.inner < _NARROW and shape[self.last] * self.inner <= _WIDEST
        self.dims = shape[: self.last] if self.has_columns else shape[: self.last + 1]
        self.width = self.inner * (shape[self.last] if self.has_columns else 1)

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes from ``start`` to ``stop``."""
        if not self.gather.moved:
            return self.checkpoint.read(self.gather.source, start, stop)
        first, last = start // self.width, -(-stop // self.width)
        if not self.has_columns:
            return self._rows(self._sources(first, last), start, stop)
        found = np.empty((last - first, self.info.shape[self.last], self.inner), np.uint8)
        step = max(_AT_ONCE // self.width, 1)
        for item, begin, end in self._items(first, last):
            columns = self.gather.columns(self.last, item)
            for low in range(begin, end, step):
                high = min(low + step, end)
                lines = self._picked(self._sources(low, high)).reshape(high - low, -1, self.inner)
                into = found[low - first : high - first]
                if columns is None:
                    into[:] = lines
                else:
                    np.take(lines, columns, axis=1, out=into, mode="clip")
        return memoryview(found.reshape(-1).data)[start - first * self.width : stop - first * self.width]

    def _items(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Lines of one item each, where columns differ from one to the next."""
        if not self.gather.within or self.last - 1 not in self.gather.within:
            yield 0, first, last
            return
        each = math.prod(self.dims[1:])
        for item in range(first // each, -(-last // each)):
            yield item, max(first, item * each), min(last, (item + 1) * each)

    def _sources(self, first: int, last: int) -> Positions:
        """The number there of each line."""
        numbers = np.arange(first, last, dtype=np.int64)
        if not self.dims:
            return numbers
        coordinates = [one.astype(np.int64) for one in np.unravel_index(numbers, self.dims)]
        return np.asarray(np.ravel_multi_index(tuple(self.gather.sources(coordinates)), self.dims), np.int64)

    def _picked(self, lines: Positions) -> Bytes:
        """Whole lines there, one after the other."""
        if _follow(lines):
            begin = int(lines[0]) * self.width
            return _array(self.checkpoint.read(self.gather.source, begin, begin + len(lines) * self.width))
        if self.checkpoint.is_view(self.gather.source) and self.width < _SHORT:
            whole = _array(self.checkpoint.read(self.gather.source)).reshape(-1, self.width)
            return np.take(whole, lines, axis=0, mode="clip")
        found = np.empty(len(lines) * self.width, np.uint8)
        for at, begin, end in self._runs(lines):
            found[at : at + end - begin] = _array(self.checkpoint.read(self.gather.source, begin, end))
        return found

    def _rows(self, lines: Positions, start: int, stop: int) -> memoryview:
        """Bytes of lines without columns: never more than those."""
        before, size = start % self.width, stop - start
        if _follow(lines):
            begin = int(lines[0]) * self.width + before
            return self.checkpoint.read(self.gather.source, begin, begin + size)
        if self.width < _SHORT:
            return memoryview(self._picked(lines).reshape(-1).data)[before : before + size]
        found = bytearray(size)
        for at, begin, end in self._runs(lines):
            low, high = max(at, before), min(at + end - begin, before + size)
            data = self.checkpoint.read(self.gather.source, begin + low - at, begin + high - at)
            found[low - before : high - before] = data
        return memoryview(found)

    def _runs(self, lines: Positions) -> Iterator[tuple[int, int, int]]:
        """Lines that follow one another there: where they are here, their begin and end there, in bytes."""
        breaks = np.flatnonzero(np.diff(lines) != 1) + 1
        for low, high in zip((0, *breaks), (*breaks, len(lines)), strict=True):
            begin = int(lines[low]) * self.width
            yield int(low) * self.width, begin, begin + int(high - low) * self.width


def _follow(lines: Positions) -> bool:
    return bool((np.diff(lines) == 1).all())


def _array(data: Any) -> Bytes:
    return np.frombuffer(data, np.uint8)
