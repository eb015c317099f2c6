"""Pages of the system's cache, let go where files exceed the memory."""

from __future__ import annotations

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

_BEHIND = 8
"""Units after which written pages have reached the device, most likely, and can be let go."""
_BLOCK = 2**22
"""Bytes of which the system holds pages together."""
_ADVICE = hasattr(os, "posix_fadvise")


class Pages:
    """What the system is told about the files of a merge; it does as it likes, and results do not depend on it."""

    def __init__(self, checkpoints: Mapping[int, Checkpoint], sinks: Sequence[Sink], *, drops: bool) -> None:
        self.checkpoints, self.sinks = checkpoints, sinks
        self.drops = drops and _ADVICE
        self._written: deque[list[Part]] = deque()
        self._lock = threading.Lock()

    def let_go(self, unit: Unit) -> None:
        """A unit is done: nothing needs the pages of what it read, and soon none of what it wrote."""
        if not self.drops:
            return
        written: list[Part] = []
        for planned in (unit.planned, *unit.more):
            start, stop = (0, None) if unit.shared is not None else (unit.start, unit.stop)
            for part in self._read(planned, start, stop):
                _advise(_with_before(part), os.POSIX_FADV_DONTNEED)
            written += [_with_before(part) for part in self._results(planned, start, stop)]
        with self._lock:
            self._written.append(written)
            ready = self._written.popleft() if len(self._written) > _BEHIND else []
        for part in (*written, *ready):  # the first time starts writing, the second time drops what was written
            _advise(part, os.POSIX_FADV_DONTNEED)

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


def _with_before(part: Part) -> Part:
    """The bytes with some before them, which are done, too, most likely: the system keeps a block of pages that it
    holds together as long as one of them lies outside of what it is told to drop."""
    descriptor, offset, length = part
    begin = max(offset - _BLOCK, 0)
    return descriptor, begin, offset + length - begin


def _advise(part: Part, advice: int) -> None:
    descriptor, offset, length = part
    if length:
        os.posix_fadvise(descriptor, offset, length, advice)
