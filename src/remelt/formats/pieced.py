"""A checkpoint whose tensors are put together of rows of another's: a view, that shares the file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from remelt.core.pieces import Converted
from remelt.formats.checkpoint import Checkpoint


class PiecedCheckpoint(Checkpoint):
    """Tensors that consist of rows of an opened checkpoint's, one piece after another; whoever opened it closes it.

    Nothing is copied where a tensor is one piece. A transposed tensor is read whole, and is meant to be small.
    ``left_out`` are keys of the other for which there is no place.
    """

    def __init__(self, checkpoint: Checkpoint, made: Mapping[str, Converted], left_out: tuple[str, ...] = ()) -> None:
        self.checkpoint, self.made, self.left_out = checkpoint, made, left_out
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self.tensors = {key: one.info for key, one in made.items()}
        self.scratch = checkpoint.scratch

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """The bytes of a tensor: as they lie where they are in one piece, else put together."""
        one = self.made[key]
        stop = one.info.nbytes if stop is None else min(stop, one.info.nbytes)
        if start >= stop:
            return memoryview(b"")
        if one.transposed:
            return self._transposed(one)[start:stop]
        parts = self._parts(one, start, stop)
        if len(parts) == 1:
            return self.checkpoint.read(*parts[0])
        joined = bytearray(stop - start)
        at = 0
        for name, begin, end in parts:
            joined[at : at + end - begin] = self.checkpoint.read(name, begin, end)
            at += end - begin
        return memoryview(joined)

    def _transposed(self, one: Converted) -> memoryview:
        (piece,) = one.pieces
        rows, columns = self.checkpoint.tensors[piece.key].shape
        stored = np.frombuffer(self.checkpoint.read(piece.key), dtype=f"V{one.info.dtype.itemsize}")
        return memoryview(np.ascontiguousarray(stored.reshape(rows, columns).T).tobytes())

    def _parts(self, one: Converted, start: int, stop: int) -> list[tuple[str, int, int]]:
        """The bytes of a tensor as bytes of the other's: key, begin and end there."""
        found = []
        at = 0
        for piece in one.pieces:
            info = self.checkpoint.tensors[piece.key]
            width = info.nbytes // max(info.shape[0] if info.shape else 1, 1)
            size = (piece.stop - piece.start) * width
            begin, end = max(start, at), min(stop, at + size)
            if begin < end:
                offset = piece.start * width - at
                found.append((piece.key, begin + offset, end + offset))
            at += size
        return found

    def is_view(self, key: str) -> bool:
        """As the other's, where the tensor is one piece of it."""
        one = self.made[key]
        return len(one.pieces) == 1 and not one.transposed and self.checkpoint.is_view(one.pieces[0].key)

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """As the other's, where these bytes are in one piece."""
        one = self.made[key]
        parts = [] if one.transposed else self._parts(one, start, min(stop, one.info.nbytes))
        return self.checkpoint.part(*parts[0]) if len(parts) == 1 else None

    def beside(self, key: str, elements: int) -> int:
        """What the other takes, and what is put together."""
        one = self.made[key]
        if one.transposed:
            return 2 * one.info.nbytes + self.checkpoint.beside(one.pieces[0].key, one.info.numel)
        joined = min(elements * one.info.dtype.itemsize, one.info.nbytes) if len(one.pieces) > 1 else 0
        return joined + max(self.checkpoint.beside(piece.key, elements) for piece in one.pieces)

    @property
    def held(self) -> int:
        """As the other's."""
        return self.checkpoint.held

    def position(self, key: str) -> tuple[int, int]:
        """Where the first piece lies."""
        first = self.made[key].pieces[0]
        file, offset = self.checkpoint.position(first.key)
        info = self.checkpoint.tensors[first.key]
        return file, offset + first.start * (info.nbytes // max(info.shape[0] if info.shape else 1, 1))

    def files(self) -> tuple[Path, ...]:
        """All files of the checkpoint."""
        return self.checkpoint.files()

    def view_of(self) -> str:
        """What each tensor consists of, as a digest."""
        told = repr([(key, one.pieces, one.transposed) for key, one in self.made.items()])
        return hashlib.sha256((told + self.checkpoint.view_of()).encode("utf-8", "surrogatepass")).hexdigest()

    def close(self) -> None:
        """Nothing: the checkpoint is not this view's."""
