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
    written: DType | None = field(default=None, repr=False, compare=False)
    """The type in which results of it are stored, where that is another one."""
    packed: int | None = field(default=None, repr=False, compare=False)
    """Bytes that it takes in its file, where those are not its own numbers."""

    numel: int = field(init=False, repr=False, compare=False)
    """Number of elements; 1 for a 0-dimensional tensor."""
    nbytes: int = field(init=False, repr=False, compare=False)
    """Size in bytes."""

    def __post_init__(self) -> None:
        numel = math.prod(self.shape)
        object.__setattr__(self, "numel", numel)
        object.__setattr__(self, "nbytes", numel * self.dtype.itemsize)

    @property
    def stored(self) -> int:
        """Bytes that are read of its file for it."""
        return self.nbytes if self.packed is None else self.packed

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """The sum of their sizes where they are stored, in bytes."""
    return sum(info.stored for info in infos)


def width_of_rows(shape: Sequence[int], vectors: str = "row") -> int:
    """Elements of a row: those of all dimensions but the first, or with ``vectors`` "line" of the last one alone.

    A tensor of fewer than two dimensions is one row, or with ``vectors`` "column" one column. With "kernel" those of a
    convolution's kernel, where it has more than one.

    >>> width_of_rows((320, 4, 3, 3)), width_of_rows((77,)), width_of_rows((77,), "column"), width_of_rows(())
    (36, 77, 1, 1)
    >>> width_of_rows((320, 4, 3, 3), "line"), width_of_rows((77,), "line"), width_of_rows((), "line")
    (3, 77, 1)
    >>> width_of_rows((320, 4, 3, 3), "kernel"), width_of_rows((320, 4, 1, 1), "kernel")
    (9, 4)
    """
    if vectors == "kernel" and len(shape) == 4 and math.prod(shape[2:]) > 1:
        return math.prod(shape[2:])
    if vectors == "line":
        return max(shape[-1] if shape else 1, 1)
    return max(math.prod(shape if len(shape) < 2 and vectors != "column" else shape[1:]), 1)


_BATCH = 2**16
"""Elements of a batch of rows, at least."""
_LARGEST_BATCH = 2**22
"""Elements of one, at most, unless it is a single row."""


def batch_of_rows(width: int) -> int:
    """How many rows are taken together where they are multiplied by matrices as wide as they are: a power of two.

    So many that reading such a matrix is little beside the product, or what a tile may hold.

    >>> [batch_of_rows(width) for width in (9, 320, 1280, 4096, 16384)]
    [8192, 256, 512, 1024, 256]
    """
    wanted = max(-(-_BATCH // width), width // 4, 8)
    return min(1 << (wanted - 1).bit_length(), max(1 << (_LARGEST_BATCH // width).bit_length() - 1, 8))
