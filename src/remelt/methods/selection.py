"""Thresholds by rank: which magnitude has a given place in the order of all, exactly, in two passes of histograms.

The bits of float32 magnitudes are in the order of the magnitudes. A first histogram counts their upper halves, and so
finds the half that the wanted magnitude has; a second one counts the lower halves of those.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

_BINS = 2**16


def upper_histogram(values: Tensor) -> Tensor:
    """How many magnitudes have each of the upper halves of float32's bits: 65,536 counts, in float64.

    >>> int(upper_histogram(torch.tensor([1.0, -1.0, 2.0]))[0x3F80])
    2
    """
    if has_torch_function_unary(values):
        return handle_torch_function(upper_histogram, (values,), values)
    return torch.bincount(_magnitudes(values) >> 16, minlength=_BINS).double()


def lower_histogram(values: Tensor, upper: float) -> Tensor:
    """How many magnitudes whose upper half is ``upper`` have each of the lower halves: 65,536 counts, in float64.

    >>> int(lower_histogram(torch.tensor([1.0, -1.0, 2.0]), 0x3F80)[0])
    2
    """
    if has_torch_function_unary(values):
        return handle_torch_function(lower_histogram, (values,), values, upper)
    bits = _magnitudes(values)
    return torch.bincount(bits[bits >> 16 == int(upper)] & 0xFFFF, minlength=_BINS).double()


def bin_of_rank(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the value of that rank, counted from 1, and its rank within the bin.

    >>> bin_of_rank(torch.tensor([2.0, 3.0]), 4)
    (1, 2)
    """
    totals = histogram.cumsum(0)
    place = min(int(torch.searchsorted(totals, torch.tensor(float(rank), dtype=totals.dtype))), len(totals) - 1)
    return place, rank - int(totals[place] - histogram[place])


def magnitude_of(upper: int, lower: int) -> float:
    """The magnitude whose bits have these halves.

    >>> magnitude_of(0x3F80, 0)
    1.0
    """
    return float(torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32))


def _magnitudes(values: Tensor) -> Tensor:
    return values.reshape(-1).float().abs().view(torch.int32)
