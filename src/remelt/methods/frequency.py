"""Frequencies: the broad shape of one tensor with the fine grain of another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from remelt.recipe.method import Number, Same, Shortcut, merge_method

_SHORTCUTS = (Shortcut("alpha", 0.0, "a"), Shortcut("alpha", 1.0, "b"))
_SHARP = 1e-10
"""Tilt below which a filter has an edge, not a slope."""
_ON_THE_EDGE = 1e-6
"""Frequencies that are this near to an edge are on it: round-off does not decide where they belong."""


@merge_method(cut="tensor", shortcuts=_SHORTCUTS, workspace=6.0)
def crossover(a: Same, b: Same, *, alpha: Number = 0.5, tilt: Number = 0.0) -> Same:
    """Low frequencies of ``a`` with high frequencies of ``b``, or by ``tilt`` anything from that to the contrary.

    Formula: a + inverse transform of F (transform of b - a), with the discrete Fourier transform over all dimensions,
    and 0 <= F <= 1 a function of the distance r from frequency 0, which is 1 in the farthest corner. At ``tilt`` 0, F
    is 1 where r > 1 - alpha; at 1 it is alpha everywhere, a weighted sum; at 2 it is 1 where r < alpha. Between, with
    c = cot(pi tilt / 2), it is alpha + c (r - 1 + alpha) up to ``tilt`` 1, and alpha + c (r - alpha) above, within 0
    and 1. ``tilt`` -t and 4 - t are as t. ``alpha`` 0 and below gives ``a``, 1 and above ``b``.

    Spaces: two weights or two deltas give the same. It costs two transforms. An element that is NaN or infinite makes
    all of the result so.

    Source: sd-mecha, crossover; but at ``tilt`` 2, where its filter is not the limit of those beside it.

    >>> from torch import tensor
    >>> crossover.on(tensor([4.0, 0.0, 0.0, 0.0]), tensor([8.0, 8.0, 8.0, 8.0]), alpha=0.5, tilt=2.0)
    tensor([11.,  7.,  7.,  7.])
    """
    if a.dim() == 0 or not a.numel() or not 0.0 < alpha < 1.0:
        return torch.lerp(a, b, min(max(alpha, 0.0), 1.0))
    spectrum = torch.fft.rfftn(b - a)
    spectrum *= _filter(spectrum.shape, alpha, tilt, a)
    crossed: Tensor = a + torch.fft.irfftn(spectrum, s=a.shape)
    return crossed


@merge_method(cut="tensor", shortcuts=_SHORTCUTS, workspace=30.0)
def distribution_crossover(a: Same, b: Same, c: Same, *, alpha: Number = 0.5, tilt: Number = 0.0) -> Same:
    """A crossover of ``a`` and ``b`` where their elements are put in the order of those of ``c``.

    Formula: with p the order of the elements of ``c``, the crossover of a_p and b_p in one dimension, put back in place

    Spaces: three weights or three deltas give the same. Where the three are alike, both rows are nearly sorted: low
    frequencies are how the values are distributed, high ones what differs from place to place. It costs a sort
    and two transforms.

    Source: sd-mecha 0.0.29, distribution_crossover; newer ones lack it.

    >>> from torch import tensor
    >>> a, b = tensor([1.0, 2.0, 3.0]), tensor([3.0, 4.0, 5.0])
    >>> distribution_crossover.on(a, b, a, alpha=0.5, tilt=2.0)
    tensor([3., 4., 5.])
    """
    if a.dim() == 0 or not a.numel() or not 0.0 < alpha < 1.0:
        return torch.lerp(a, b, min(max(alpha, 0.0), 1.0))
    order = c.reshape(-1).argsort(stable=True)
    spectrum = torch.fft.rfft((b - a).reshape(-1)[order])
    spectrum *= _filter(spectrum.shape, alpha, tilt, a)
    change = torch.fft.irfft(spectrum, n=a.numel())
    del spectrum
    placed = torch.empty_like(change).scatter_(0, order, change)
    return a + placed.reshape(a.shape)


def _filter(shape: tuple[int, ...], alpha: float, tilt: float, like: Tensor) -> Tensor:
    """What share of each frequency of a spectrum is of the second tensor."""
    tilt = math.fmod(abs(tilt), 4.0)
    tilt = min(tilt, 4.0 - tilt)
    radius = _distances(shape, like)
    if tilt < _SHARP:
        return (radius > 1.0 - alpha + _ON_THE_EDGE).to(like.dtype)
    if tilt > 2.0 - _SHARP:
        return (radius < alpha - _ON_THE_EDGE).to(like.dtype)
    slope = 1.0 / math.tan(math.pi * tilt / 2.0)
    pivot = 1.0 - alpha if tilt <= 1.0 else alpha
    return radius.sub_(pivot).mul_(slope).add_(alpha).clamp_(0.0, 1.0)


def _distances(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """How far each frequency is from 0: the root of the mean square of its share of the highest in each dimension."""
    total = torch.zeros(shape, dtype=like.dtype, device=like.device)
    for dimension, size in enumerate(shape):
        share = _shares(size, halved=dimension == len(shape) - 1, like=like)
        total += share.square_().reshape(-1, *[1] * (len(shape) - 1 - dimension))
    return total.div_(len(shape)).sqrt_()


def _shares(size: int, *, halved: bool, like: Tensor) -> Tensor:
    """Frequencies of one dimension as shares of the highest; half of them, or with the negative ones in the second."""
    made = {"dtype": like.dtype, "device": like.device}
    if halved or size == 1:
        return torch.linspace(0.0, 1.0, size, **made)  # type: ignore[call-overload, no-any-return]
    negative = size // 2
    positive = size - negative
    rising = torch.linspace(0.0, (size - 1) // 2, positive, **made)  # type: ignore[call-overload]
    falling = torch.linspace(negative, 1.0, negative, **made)  # type: ignore[call-overload]
    return torch.cat((rising, falling)).div_(negative)
