"""A model that is in memory already: buffers with types and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from remelt.core.tensor_info import TensorInfo
from remelt.errors import FormatError
from remelt.formats.checkpoint import Checkpoint


class MemoryCheckpoint(Checkpoint):
    """Tensors given as C-contiguous buffers."""

    def __init__(self, tensors: Mapping[str, tuple[TensorInfo, memoryview]]) -> None:
        self.path = None
        self.format = "memory"
        self.metadata: Mapping[str, str] = {}
        self._data = {key: data for key, (_, data) in tensors.items()}
        self.tensors = {key: info for key, (info, _) in tensors.items()}
        for key, info in self.tensors.items():
            if len(self._data[key]) != info.nbytes:
                raise FormatError(
                    f"{key} is {info}, which is {info.nbytes} bytes, but {len(self._data[key])} are given"
                )

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes of a tensor, as a view."""
        return self._data[key][start:stop]

    def position(self, key: str) -> tuple[int, int]:
        """Nothing is read faster in any order."""
        return 0, 0

    def files(self) -> tuple[Path, ...]:
        """None."""
        return ()

    def close(self) -> None:
        """The buffers belong to the caller."""
