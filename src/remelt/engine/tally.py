"""What a merge reads, writes and waits for: counted by each thread on its own, so that counting disturbs none."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass
class Tally:
    """Bytes of inputs and results, calls of kernels and methods on tiles, and the seconds that they took."""

    read: int = 0
    written: int = 0
    tiles: int = 0
    reading: float = 0.0
    """Seconds in calls that read files; mapped files are read while computing."""
    computing: float = 0.0
    writing: float = 0.0
    waiting: float = 0.0
    """Seconds without a unit of work, or until the memory budget allowed one."""


class Tallies:
    """The tallies of all threads of a merge."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[Tally] = []

    def mine(self) -> Tally:
        """The calling thread's."""
        found: Tally | None = self._local.__dict__.get("tally")
        if found is None:
            found = self._local.tally = Tally()
            self._all.append(found)
        return found

    @property
    def written(self) -> int:
        """Bytes of results that all threads have written."""
        return sum(tally.written for tally in self._all)

    def total(self) -> Tally:
        """All threads' together."""
        return together(self._all)


def together(tallies: Sequence[Tally]) -> Tally:
    """The sums of several tallies."""
    return Tally(**{field.name: sum(getattr(tally, field.name) for tally in tallies) for field in fields(Tally)})
