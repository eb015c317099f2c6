"""Tensors that are made of rows of others: what a conversion between layouts of keys comes to."""

from __future__ import annotations

from dataclasses import dataclass

from remelt.core.tensor_info import TensorInfo


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor of the layout that is read."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class Converted:
    """A tensor of the layout that is made: its type and shape, and the rows of which it consists, in order."""

    info: TensorInfo
    pieces: tuple[Piece, ...]
    transposed: bool = False
