"""A file of quantised tensors, seen as one of numbers: each is dequantised where it is read, and nothing is held."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from remelt.core.dtype import DType
from remelt.core.tensor_info import TensorInfo
from remelt.formats.checkpoint import Checkpoint
from remelt.formats.quantised.codes import Floats, bytes_of, numbers
from remelt.formats.quantised.recognition import find_quantised
from remelt.formats.quantised.schemes import Quantised

_WIDE = 2**20
"""Elements of a part that must be taken whole, from which on the last one is kept: slices of it are read in turn."""
_SMALL = 4096
"""Elements of a marker, at most."""


class DequantisedCheckpoint(Checkpoint):
    """An opened checkpoint whose quantised tensors are read as float32; it is closed with this view.

    ``quantised`` tells them by key; what holds them (scales, tables) is not among the tensors. Results of them are
    stored as bfloat16, unless another type is asked for: float32 would say what no quantised file knows.
    """

    def __init__(self, checkpoint: Checkpoint, quantised: Mapping[str, Quantised], hidden: frozenset[str]) -> None:
        self.checkpoint, self.quantised, self.hidden = checkpoint, quantised, hidden
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self.inherited = checkpoint.inherited
        self.tensors = {}
        names = {one.parts["weight"]: name for name, one in quantised.items()}
        for key, info in checkpoint.tensors.items():
            name = names.get(key)
            if name is not None:
                size = sum(part.nbytes for part in quantised[name].infos.values())
                self.tensors[name] = TensorInfo(DType.F32, quantised[name].shape, DType.BF16, size)
            elif key not in hidden:
                self.tensors[key] = info
        self._last: tuple[str, int, Floats] | None = None
        self._lock = threading.Lock()

    def read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes of a tensor; of a quantised one as float32."""
        one = self.quantised.get(key)
        if one is None:
            return self.checkpoint.read(key, start, stop)
        info = self.tensors[key]
        stop = info.nbytes if stop is None else min(stop, info.nbytes)
        if start >= stop:
            return memoryview(b"")
        begin, end, grain = start // 4, -(-stop // 4), one.grain
        first, last = begin // grain * grain, min(-(-end // grain) * grain, info.numel)
        found = self._elements(key, one, first, last)
        return bytes_of(found)[start - 4 * first : stop - 4 * first]

    def _elements(self, key: str, one: Quantised, first: int, last: int) -> Floats:
        kept = one.grain >= _WIDE and last - first == one.grain
        if kept:
            with self._lock:
                if self._last is None or self._last[:2] != (key, first):
                    self._last = key, first, one.elements(self.checkpoint.read, first, last)
                return self._last[2]
        return np.ascontiguousarray(one.elements(self.checkpoint.read, first, last))

    def is_view(self, key: str) -> bool:
        """Whether the tensor is stored as it is."""
        return key not in self.quantised and self.checkpoint.is_view(key)

    def part(self, key: str, start: int, stop: int) -> tuple[int, int, int] | None:
        """The bytes of what is stored as it is."""
        return None if key in self.quantised else self.checkpoint.part(key, start, stop)

    def position(self, key: str) -> tuple[int, int]:
        """Where the weight lies."""
        one = self.quantised.get(key)
        return self.checkpoint.position(key if one is None else one.parts["weight"])

    def files(self) -> tuple[Path, ...]:
        """The files of the checkpoint."""
        return self.checkpoint.files()

    def view_of(self) -> str:
        """That numbers are read, and as what."""
        return f"dequantised {self.checkpoint.view_of()}"

    def small_parts(self) -> Iterator[tuple[str, tuple[TensorInfo, list[float]]]]:
        """Markers and scales of inputs: small tensors that stand beside quantised ones, with their numbers."""
        used = {name for one in self.quantised.values() for name in one.parts.values()}
        for key in self.checkpoint.tensors:
            info = self.checkpoint.tensors[key]
            if key in self.hidden and key not in used and info.numel <= _SMALL and "quant_state" not in key:
                yield key, (info, numbers(self.checkpoint.read(key), info.dtype).tolist())

    def close(self) -> None:
        """Close the file."""
        self.checkpoint.close()


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantised tensors as numbers; itself where it has none.

    Raises `FormatError` where scales are missing or do not fit, and for quantisations that are not read.
    """
    quantised, hidden = find_quantised(checkpoint.tensors, lambda key: checkpoint.read(key), checkpoint.path)
    quantised |= checkpoint.quantised
    return DequantisedCheckpoint(checkpoint, quantised, hidden) if quantised or hidden else checkpoint
