"""Where a tile lies in its tensor, for methods that do other things in other regions of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """The first of a tile's elements in the flattened tensor, and the tensor's whole shape.

    >>> Place(offset=12, shape=(8, 4)).offset // 4  # the row of the tensor that the tile's first row is
    3
    """

    offset: int
    shape: tuple[int, ...]
