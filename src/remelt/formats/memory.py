"""A model that is in memory already: buffers with types and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.tensor_names import shown


class MemoryCheckpoint(Checkpoint):
    """Tensors given as C-contiguous buffers: bytes, memory views, numpy arrays.

    Raises `FormatError` for a buffer that is not contiguous, or not of its tensor's size.
    """

    def __init__(self, tensors: Mapping[str, tuple[TensorInfo, Any]]) -> None:
        self.path = None
        self.format = "memory"
        self.metadata: Mapping[str, str] = {}
        self.tensors = {key: info for key, (info, _) in tensors.items()}
        self._data = {key: _flat(key, info, buffer) for key, (info, buffer) in tensors.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes of a tensor, as a view."""
        return self._data[key][start:stop]

    def is_view(self, key: str) -> bool:
        """Always."""
        return True

    def position(self, key: str) -> tuple[int, int]:
        """Nothing is read faster in any order."""
        return 0, 0

    def files(self) -> tuple[Path, ...]:
        """None."""
        return ()

    def close(self) -> None:
        """The buffers belong to the caller."""


def _flat(key: str, info: TensorInfo, buffer: Any) -> memoryview:
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise FormatError(f"the buffer of {shown(key)} is not C-contiguous", hint="numpy.ascontiguousarray lays it out")
    if view.nbytes != info.nbytes:
        raise FormatError(f"{shown(key)} is {info}, which is {info.nbytes} bytes, but {view.nbytes} are given")
    return view.cast("B") if view.nbytes else memoryview(b"")
