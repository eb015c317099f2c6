"""Thresholds by rank: which magnitude has a given place in the order of all, exactly, in two passes of histograms.

The bits of float32 magnitudes are in the order of the magnitudes. A first histogram counts their upper halves, and so
finds the half that the wanted magnitude has; a second one counts the lower halves of those.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

_BINS = 2**16
_ROWS = 2**8


def upper_histogram(values: Tensor) -> Tensor:
    """How many magnitudes have each of the upper halves of float32's bits: 65,536 counts.

    >>> int(upper_histogram(torch.tensor([1.0, -1.0, 2.0]))[0x3F80])
    2
    """
    if has_torch_function_unary(values):
        return handle_torch_function(upper_histogram, (values,), values)
    return torch.bincount(_magnitudes(values) >> 16, minlength=_BINS)


def lower_histogram(values: Tensor, upper: float) -> Tensor:
    """How many magnitudes whose upper half is ``upper`` have each of the lower halves: 65,536 counts.

    >>> int(lower_histogram(torch.tensor([1.0, -1.0, 2.0]), 0x3F80)[0])
    2
    """
    if has_torch_function_unary(values):
        return handle_torch_function(lower_histogram, (values,), values, upper)
    bits = _magnitudes(values)
    return torch.bincount(bits[bits >> 16 == int(upper)] & 0xFFFF, minlength=_BINS)


def bin_of_share(histogram: Tensor, share: float) -> tuple[int, int]:
    """The bin of the first value above that share of all, in order, and its rank within the bin, counted from 1.

    >>> bin_of_share(torch.tensor([2, 3]), 0.8)
    (1, 2)
    """
    rows, ends = _rows(histogram)
    return _place(rows, ends, max(int(share * int(ends[-1])), 1))


def bin_of_rank(histogram: Tensor, rank: int) -> int:
    """The bin of the value of that rank in order, counted from 1.

    >>> bin_of_rank(torch.tensor([2, 3]), 4)
    1
    """
    return _place(*_rows(histogram), rank)[0]


def _rows(histogram: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A histogram in rows, and how many values there are up to the end of each: most rows need not be looked at."""
    counts = histogram.numpy()
    rows = counts.reshape(_ROWS if len(counts) % _ROWS == 0 else 1, -1)
    return rows, rows.sum(1).cumsum()


def _place(rows: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    if not ends[-1]:
        return 0, rank
    row = min(int(np.searchsorted(ends, rank)), len(rows) - 1)
    within = rows[row].cumsum()
    rank -= int(ends[row] - within[-1])
    place = min(int(np.searchsorted(within, rank)), len(within) - 1)
    return row * len(within) + place, rank - int(within[place] - rows[row, place])


def magnitude_of(upper: int, lower: int) -> float:
    """The magnitude whose bits have these halves.

    >>> magnitude_of(0x3F80, 0)
    1.0
    """
    return float(np.int32(upper << 16 | lower).view(np.float32))


def _magnitudes(values: Tensor) -> Tensor:
    return values.reshape(-1).float().abs().view(torch.int32)
