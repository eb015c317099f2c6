"""Smoothing: a difference added without its outliers, each element seen among its neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from remelt.recipe.method import Bindings, Delta, Mask, Number, Same, Shortcut, merge_method

_CHUNK = 2**16
"""Neighbours that are gathered at a time."""
_REACH = 4.0
"""Standard deviations at which a bell curve is cut off."""
_SHORTCUTS = (Shortcut("alpha", 0.0, "a"),)
_IDENTITIES = ("a",)


def _work(shapes: Sequence[tuple[int, ...]], values: Bindings) -> float:
    """Operations, counted as those of one thread that makes ten thousand millions of them a second."""
    return 150.0 * math.prod(shapes[0]) * 3.0 ** sum(size > 1 for size in shapes[0])


@merge_method(
    cut="tensor", shortcuts=_SHORTCUTS, identities=_IDENTITIES, work=_work, faster="smooth_add_gaussian", workspace=5.0
)
def smooth_add(a: Same, b: Delta, *, alpha: Mask = 1.0, sigma: Number = 1.0) -> Same:
    """Add a difference after a median and a Gaussian filter.

    Formula: a + alpha G(M(b)), with M(b) the median of each element and its neighbours, one to each side in every
    dimension, and G a mean weighted by exp(-d^2 / (2 sigma^2)) of those at most 4 ``sigma`` away in every dimension.
    At the borders the tensor is mirrored. At ``sigma`` 0 and below, G is nothing.

    Spaces: ``b`` is a delta, written ``b - c``; ``a`` is a weight or a delta. At ``alpha`` 0 only ``a`` is read. It
    takes out what stands alone in a difference; note that the neighbours of a weight, other than within the kernels of
    a convolution, have as a rule nothing to do with it. Kernels cost most: the median of 81 numbers for each.

    Source: supermerger, "smoothAdd", whose filters are those of SciPy of size 3 and standard deviation 1.

    >>> from torch import tensor
    >>> smooth_add.on(tensor([1.0, 1.0, 1.0]), tensor([2.0, 90.0, 2.0]), alpha=0.5)
    tensor([2., 2., 2.])
    """
    smoothed: Tensor = a + alpha * _blurred(_medians(b), sigma)
    return smoothed


@merge_method(
    cut="tensor", shortcuts=_SHORTCUTS, identities=_IDENTITIES, work=_work, faster="smooth_add_gaussian", workspace=5.0
)
def smooth_add_median(a: Same, b: Delta, *, alpha: Mask = 1.0) -> Same:
    """Add a difference after a median filter.

    Formula: a + alpha M(b), with M(b) the median of each element and its neighbours, one to each side in every
    dimension; at the borders the tensor is mirrored.

    Spaces: ``b`` is a delta, written ``b - c``; ``a`` is a weight or a delta. At ``alpha`` 0 only ``a`` is read. It
    costs as much as `smooth_add`, of which it is the first half.

    Source: supermerger, the median filter of "smoothAdd".

    >>> from torch import tensor
    >>> smooth_add_median.on(tensor([1.0, 1.0, 1.0]), tensor([2.0, 90.0, 4.0]))
    tensor([3., 5., 5.])
    """
    smoothed: Tensor = a + alpha * _medians(b)
    return smoothed


@merge_method(cut="tensor", shortcuts=_SHORTCUTS, identities=_IDENTITIES, workspace=4.0)
def smooth_add_gaussian(a: Same, b: Delta, *, alpha: Mask = 1.0, sigma: Number = 1.0) -> Same:
    """Add a difference after a Gaussian filter.

    Formula: a + alpha G(b), with G a mean weighted by exp(-d^2 / (2 sigma^2)) of the elements at most 4 ``sigma`` away
    in every dimension; at the borders the tensor is mirrored. At ``sigma`` 0 and below, G is nothing.

    Spaces: ``b`` is a delta, written ``b - c``; ``a`` is a weight or a delta. At ``alpha`` 0 only ``a`` is read. It is
    the second half of `smooth_add`, and costs little.

    Source: supermerger, the Gaussian filter of "smoothAdd".

    >>> from torch import tensor
    >>> smooth_add_gaussian.on(tensor([1.0, 1.0]), tensor([2.0, 2.0]), alpha=0.5)
    tensor([2., 2.])
    """
    smoothed: Tensor = a + alpha * _blurred(b, sigma)
    return smoothed


def _medians(values: Tensor) -> Tensor:
    """The median of each element and its neighbours, one to each side in every dimension."""
    dimensions = [dimension for dimension, size in enumerate(values.shape) if size > 1]
    if not dimensions or not values.numel():
        return values  # where all neighbours are the element itself, it is their median
    longest = max(dimensions, key=lambda dimension: values.shape[dimension])
    medians = torch.empty_like(values, memory_format=torch.contiguous_format)
    size = values.shape[longest]
    step = max(_CHUNK * size // (values.numel() * 3 ** len(dimensions)), 1)
    for begin in range(0, size, step):
        count = min(step, size - begin)
        places = torch.arange(begin - 1, begin + count + 1, device=values.device).clamp_(0, size - 1)
        shifted = [values.index_select(longest, places)]
        for dimension in dimensions:
            if dimension != longest:
                ends = [shifted[0].narrow(dimension, place, 1) for place in (0, values.shape[dimension] - 1)]
                shifted = [torch.cat((ends[0], shifted[0], ends[1]), dimension)]
        for dimension in dimensions:
            length = count if dimension == longest else values.shape[dimension]
            shifted = [one.narrow(dimension, shift, length) for one in shifted for shift in range(3)]
        medians.narrow(longest, begin, count).copy_(_median(shifted))
    return medians


def _median(tensors: list[Tensor]) -> Tensor:
    """The median of 3, 9, 27 or more tensors, element by element; NaN where one of them is."""
    if len(tensors) > 9:
        stacked = torch.stack(tensors, -1)
        ordered = torch.from_numpy(
            np.partition(stacked.cpu().numpy(), len(tensors) // 2, -1)
        )  # ten times torch's speed
        median = ordered[..., len(tensors) // 2].to(stacked.device)
        if bool(stacked.sum().isnan()):  # which infinities may be, too
            median = torch.where(stacked.isnan().any(-1), math.nan, median)
        return median
    if len(tensors) == 9:  # of three by three the lowest, middle and highest: the middle of all is among few of them
        threes = [_sorted(*tensors[begin : begin + 3]) for begin in (0, 3, 6)]
        lowest, middle, highest = zip(*threes, strict=True)
        tensors = [
            torch.maximum(torch.maximum(lowest[0], lowest[1]), lowest[2]),
            _sorted(*middle)[1],
            torch.minimum(torch.minimum(highest[0], highest[1]), highest[2]),
        ]
    return _sorted(*tensors)[1]


def _sorted(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors sorted element by element; NaN wherever one has it."""
    low, high = torch.minimum(x, y), torch.maximum(x, y)
    least, rest = torch.minimum(low, z), torch.maximum(low, z)
    return least, torch.minimum(rest, high), torch.maximum(rest, high)


def _blurred(values: Tensor, sigma: float) -> Tensor:
    """A mean of each element and those about it, weighted by a bell curve, one dimension after the other."""
    if sigma <= 0.0 or not values.numel():
        return values
    radius = int(_REACH * sigma + 0.5)
    curve = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(-radius, radius + 1)]
    area = sum(curve)
    for dimension, size in enumerate(values.shape):
        if size == 1:
            continue
        places = torch.arange(-radius, size + radius, device=values.device) % (2 * size)
        mirrored = torch.minimum(places, 2 * size - 1 - places)
        blurred = torch.zeros_like(values)
        for shift, weight in enumerate(curve):
            blurred.add_(values.index_select(dimension, mirrored[shift : shift + size]), alpha=weight / area)
        values = blurred
    return values
