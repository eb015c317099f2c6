"""Python's search for cycles of garbage, set aside where many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_RARE = 100_000, 50, 50
"""Objects that are made between two collections of the youngest, and how many of those between two of the older."""


@contextmanager
def collection_rare() -> Iterator[None]:
    """What a whole process does, with few collections, and with none of what it still holds as it ends.

    Importing torch makes half a million objects that stay: going through them while they are made and once more at the
    process's end takes a fifth of the time of a short command.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_RARE)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.freeze()


@contextmanager
def collection_paused() -> Iterator[None]:
    """Make objects without the collector going through all of them again and again: it takes half of the time.

    Whether it was at work before is restored after.
    """
    working = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if working:
            gc.enable()
