from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Memory: TypeAlias = memoryview | bytes | bytearray | npt.NDArray[Any] | tuple[int, int] | tuple[int, int, int]
"""A contiguous buffer; an address and the bytes there, of any alignment; or a file's descriptor, offset and bytes."""

FILES: bool

BLOCK: int
CHUNK: int
ROW: int
OPERATIONS: dict[str, int]
TYPES: dict[str, int]

class Program:
    def __new__(
        cls,
        instructions: npt.NDArray[np.uint16],
        registers: int,
        numbers: int,
        inputs: int,
        outputs: int,
        accumulators: int = 0,
        histograms: int = 0,
    ) -> Program: ...
    @property
    def length(self) -> int: ...
    @property
    def registers(self) -> int: ...
    @property
    def numbers(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def stores(self) -> int: ...
    @property
    def accumulators(self) -> int: ...
    @property
    def histograms(self) -> int: ...
    @property
    def counts(self) -> int: ...

class Report(NamedTuple):
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    checksums: tuple[int, ...]
    reading: int
    writing: int

def run(
    program: Program,
    numbers: npt.NDArray[np.float64] | Sequence[float],
    inputs: Sequence[Memory],
    outputs: Sequence[Memory],
    count: int,
    *,
    start: int = 0,
    sums: npt.NDArray[np.float64] | None = None,
    counts: npt.NDArray[np.int32] | None = None,
) -> Report: ...
def inspect(data: Memory, type: int, start: int = 0, /) -> tuple[bool, int]: ...
def capability() -> str: ...
def capabilities() -> tuple[str, ...]: ...
def use(name: str, /) -> None: ...
def set_places(table: npt.NDArray[np.uint64], /) -> None: ...
