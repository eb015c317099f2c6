"""Pages of the system's cache, let go where files exceed the memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from remelt.engine.sink import Sink
from remelt.engine.units import Unit
from remelt.formats.checkpoint import Checkpoint
from remelt.planning.plan import PlannedTask

Part = tuple[int, int, int]
"""Bytes of an open file: its descriptor, their offset, and their number."""

_BEHIND = 2**27
"""Bytes of inputs and results between what is done and what is let go: more than the system reads ahead."""
_BLOCK = 2**22
"""Bytes of which the system holds pages together."""
_ADVICE = hasattr(os, "posix_fadvise")


class Pages:
    """What the system is told about the files of a merge; it does as it likes, and results do not depend on it."""

    def __init__(self, checkpoints: Mapping[int, Checkpoint], sinks: Sequence[Sink], *, drops: bool) -> None:
        self.checkpoints, self.sinks = checkpoints, sinks
        self.drops = drops and _ADVICE
        self._waiting: deque[Part] = deque()
        self._bytes = 0
        self._done: dict[int, Ranges] = {}
        self._lock = threading.Lock()

    def let_go(self, unit: Unit) -> None:
        """A unit is done: soon, nothing needs the pages of what it read and wrote.

        They are let go some units later: what was written has reached the device by then, and what lies around is not
        read any more, nor read ahead, in whichever order a file is read.
        """
        if not self.drops:
            return
        start, stop = unit.results
        parts: list[Part] = []
        for planned in (unit.planned, *unit.more):
            results = list(self._results(planned, start, stop))
            parts += [*self._read(planned, start, stop), *results]
            for part in results:
                _advise(part)  # which starts writing
        with self._lock:
            for descriptor, offset, length in parts:
                self._done.setdefault(descriptor, Ranges()).add(offset, offset + length)
            self._waiting += parts
            self._bytes += sum(part[2] for part in parts)
            ready: list[Part] = []
            while self._bytes > _BEHIND:
                ready.append(self._waiting.popleft())
                self._bytes -= ready[-1][2]
            around = [(part[0], *self._done[part[0]].around(part[1], part[1] + part[2], _BLOCK)) for part in ready]
        for descriptor, begin, end in around:
            _advise((descriptor, begin, end - begin))

    def finish(self) -> None:
        """The merge is over: let go of what is left."""
        for descriptor, offset, length in self._waiting:
            begin, end = self._done[descriptor].around(offset, offset + length, _BLOCK)
            _advise((descriptor, begin, end - begin))
        self._waiting.clear()

    def _read(self, planned: PlannedTask, start: int, stop: int | None) -> Iterator[Part]:
        for load in planned.task.program.loads:
            checkpoint, key = self.checkpoints[load.input], load.key or planned.task.key
            info = checkpoint.tensors[key]
            width = info.dtype.itemsize
            part = checkpoint.part(key, start * width, info.nbytes if stop is None else stop * width)
            if part is not None:
                yield part

    def _results(self, planned: PlannedTask, start: int, stop: int | None) -> Iterator[Part]:
        for root, key, info in planned.task.outputs:
            width = info.dtype.itemsize
            place = self.sinks[root].place(key, start * width, info.nbytes if stop is None else stop * width)
            if isinstance(place, tuple):
                yield place


class Ranges:
    """What is done of a file: bytes in ranges that touch none of each other."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        self._begins: dict[int, int] = {}

    def add(self, begin: int, end: int) -> None:
        """Bytes are done that were not before."""
        if begin == end:
            return
        begin = self._begins.pop(begin, begin)
        end = self._ends.pop(end, end)
        self._ends[begin] = end
        self._begins[end] = begin

    def around(self, begin: int, end: int, most: int) -> tuple[int, int]:
        """The bytes with those done beside them, at most so many on either side: the system keeps a block of pages that
        it holds together as long as one of them lies outside of what it is told to drop."""
        for first, last in self._ends.items():
            if first <= begin and end <= last:
                return max(first, begin - most), min(last, end + most)
        return begin, end


def _advise(part: Part) -> None:
    """Let pages go, or have them written first; a system that takes no advice goes on without."""
    descriptor, offset, length = part
    if length:
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
