"""Where the time of a merge went, and how near it came to what the machine can do."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from remelt.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from remelt.engine.tally import Tally

_SIZE = 2**27
"""Bytes that are copied to find a bandwidth."""
_PIECE = 2**18


@dataclass(frozen=True)
class Profile:
    """The seconds of a merge by phase, what its threads did meanwhile, and the bandwidths that it is held against.

    ``memory`` and ``copy`` are bytes a second: of copying in memory by as many threads, bytes read and written counted,
    and of writing a file where the result is, from memory. They are None where they were not measured.
    """

    planning: float
    merging: float
    publishing: float
    threads: int
    tally: Tally
    memory: float | None = None
    copy: float | None = None

    def record(self) -> dict[str, Any]:
        """All of it for programs."""
        return asdict(self)

    def lines(self) -> list[str]:
        """All of it for people."""
        tally, whole = self.tally, max(self.merging * self.threads, 1e-9)
        parts = {
            "reading": tally.reading,
            "computing": tally.computing,
            "writing": tally.writing,
            "waiting for work or memory": tally.waiting,
        }
        parts["everything else"] = max(whole - sum(parts.values()), 0.0)
        found = [
            ", ".join(
                (
                    f"planning {format_seconds(self.planning)}",
                    f"merging {format_seconds(self.merging)} on {self.threads} thread{'s' if self.threads > 1 else ''}",
                    f"publishing {format_seconds(self.publishing)}",
                )
            ),
            *(f"  {name:<28}{seconds:8.2f} s {100 * seconds / whole:5.0f} %" for name, seconds in parts.items()),
            f"  {format_bytes(tally.read)} read, {format_bytes(tally.written)} written, in {tally.tiles} calls",
        ]
        seconds = max(self.merging, 1e-9)
        if self.copy:
            rate = tally.written / seconds
            found.append(
                f"  written at {format_bytes(round(rate))}/s: {100 * rate / self.copy:.0f} % of the "
                f"{format_bytes(round(self.copy))}/s at which a file is copied here"
            )
        if self.memory:
            rate = (tally.read + tally.written) / seconds
            found.append(
                f"  read and written at {format_bytes(round(rate))}/s: {100 * rate / self.memory:.0f} % of the "
                f"{format_bytes(round(self.memory))}/s of memory"
            )
        return found


def memory_bandwidth(threads: int) -> float:
    """Bytes a second, read and written, of copying in memory by that many threads."""
    import numpy as np

    arrays = [
        (np.ones(_SIZE // threads, dtype=np.uint8), np.ones(_SIZE // threads, dtype=np.uint8)) for _ in range(threads)
    ]

    def copy() -> None:
        workers = [threading.Thread(target=np.copyto, args=pair) for pair in arrays]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return 2 * _SIZE / _quickest(copy)


def copy_bandwidth(folder: Path) -> float | None:
    """Bytes a second of writing a file in a folder, unflushed; None where it cannot be written."""
    data = memoryview(bytearray(b"\x5a" * _PIECE))

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, _SIZE)
            for _ in range(_SIZE // _PIECE):
                os.write(file.fileno(), data)

    try:
        return _SIZE / _quickest(write)
    except OSError:
        return None


def _quickest(function: Callable[[], None]) -> float:
    """The seconds of the quickest of three calls."""
    found = []
    for _ in range(3):
        begun = perf_counter()
        function()
        found.append(perf_counter() - begun)
    return max(min(found), 1e-9)
