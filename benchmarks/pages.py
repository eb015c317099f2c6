"""Pages of memory that are equally fresh for all: inputs in the page cache, and free pages that a result can take.

A virtual machine gives free pages back to its host within seconds, and each costs several times as much when taken
again: what starts at once would win against what imports for seconds before.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_PIECE = 2**20


def warm(paths: Iterable[Path]) -> None:
    """Read files once, so that they are in the page cache."""
    buffer = bytearray(8 * _PIECE)
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else (path,):
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass


def freshen(folder: Path, size: int) -> None:
    """Take as much of the page cache as a result will, and let it go."""
    path, data = folder / "fresh", bytes(_PIECE)
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, size, _PIECE):
            file.write(memoryview(data)[: min(_PIECE, size - begin)])
    os.unlink(path)
