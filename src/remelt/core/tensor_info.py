"""What a header says of a tensor: element type and shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from remelt.core.dtype import DType


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's element type and shape, without its data.

    >>> TensorInfo(DType.F16, (4, 3)).nbytes
    24
    """

    dtype: DType
    shape: tuple[int, ...]

    numel: int = field(init=False, repr=False, compare=False)
    """Number of elements; 1 for a 0-dimensional tensor."""
    nbytes: int = field(init=False, repr=False, compare=False)
    """Size in bytes."""

    def __post_init__(self) -> None:
        numel = math.prod(self.shape)
        object.__setattr__(self, "numel", numel)
        object.__setattr__(self, "nbytes", numel * self.dtype.itemsize)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """The sum of their sizes, in bytes."""
    return sum(info.nbytes for info in infos)


def width_of_rows(shape: Sequence[int], vectors: str = "row") -> int:
    """Elements of a row: those of all dimensions but the first, or with ``vectors`` "line" of the last one alone.

    A tensor of fewer than two dimensions is one row, or with ``vectors`` "column" one column.

    >>> width_of_rows((320, 4, 3, 3)), width_of_rows((77,)), width_of_rows((77,), "column"), width_of_rows(())
    (36, 77, 1, 1)
    >>> width_of_rows((320, 4, 3, 3), "line"), width_of_rows((77,), "line"), width_of_rows((), "line")
    (3, 77, 1)
    """
    if vectors == "line":
        return max(shape[-1] if shape else 1, 1)
    return max(math.prod(shape if len(shape) < 2 and vectors == "row" else shape[1:]), 1)
