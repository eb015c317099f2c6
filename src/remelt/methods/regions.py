"""Regions: parts of a tensor taken from another, by place or by size; rows in another order."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from remelt.core.place import Place
from remelt.core.random import Random
from remelt.recipe.method import Integer, Number, Same, Shortcut, Text, merge_method

_FEW = 100
"""Columns up to which supermerger takes rows in their stead."""


@merge_method(
    cut="row",
    vectors="column",
    limits={"along": ("rows", "columns")},
    shortcuts=(Shortcut("width", 0.0, "a"), Shortcut("width", 1.0, "b")),
    workspace=1.0,
)
def tensor_sum(
    a: Same, b: Same, *, width: Number = 0.5, offset: Number = 0.0, along: Text = "rows", place: Place
) -> Same:
    """Some rows of ``b``, the others of ``a``: also known as copy_region.

    Formula: of n rows along the first dimension, those from offset n to (offset + width) n are of ``b``, rounded, and
    counted on from the first after the last; a negative ``width`` is that of the rows before the offset. With ``along``
    "columns" they are those of the second dimension, where that has more than 100. A single number is that of ``b``
    where ``width`` is above 0.5.

    Spaces: two weights or two deltas give the same. At ``width`` 0 only ``a`` is read, at 1 only ``b``. Takes over some
    outputs of every layer whole, where a weighted sum would blend all of them. It costs no more than a copy.

    Source: supermerger, "tensor" and, along columns, "tensor2", whose alpha and beta are the width and the offset and
    whose ends are rounded down; sd-mecha, copy_region and tensor_sum.

    >>> from torch import tensor
    >>> tensor_sum.on(tensor([1.0, 1.0, 1.0, 1.0]), tensor([2.0, 2.0, 2.0, 2.0]), width=0.5, offset=0.75)
    tensor([2., 1., 1., 2.])
    """
    if not place.shape:
        return b if width > 0.5 else a
    across = along == "columns" and len(place.shape) > 1 and place.shape[1] > _FEW
    begin, end, outside = _region(width, offset, place.shape[1 if across else 0])
    around, within = (b, a) if outside else (a, b)
    result = around.clone()
    if across:
        inner = a.shape[1] // place.shape[1]
        result[:, begin * inner : end * inner] = within[:, begin * inner : end * inner]
    else:
        first = place.offset // max(a.shape[1], 1)
        begin, end = max(begin - first, 0), max(end - first, 0)
        result[begin:end] = within[begin:end]
    return result


@merge_method(cut="tensor", workspace=10.0)
def top_k_tensor_sum(a: Same, b: Same, *, width: Number = 1.0, offset: Number = 0.0) -> Same:
    """The numbers of ``a`` in the order of size that those of ``b`` have, for numbers of some sizes.

    Formula: a'_i = the element of ``a`` whose rank among all of ``a`` is that of b_i among all of ``b``, if its
    magnitude is between the (offset n)-th and the ((offset + width) n)-th least of the n magnitudes of ``a``, both
    included, else a_i. Ranks are rounded; the 0th magnitude is less than all, and what runs over n goes on from 0.

    Spaces: two weights or two deltas give the same. It keeps the distribution of ``a`` as far as it goes, and costs
    two sorts.

    Source: sd-mecha, top_k_tensor_sum.

    >>> from torch import tensor
    >>> top_k_tensor_sum.on(tensor([1.0, 2.0, 3.0]), tensor([9.0, 8.0, 7.0]))
    tensor([3., 2., 1.])
    """
    flat = a.reshape(-1)
    begin, end, outside = _region(width, offset, len(flat))
    ordered = flat.sort().values
    magnitudes = ordered.abs()
    taken = (magnitudes >= _least(magnitudes, begin)) & (magnitudes <= _least(magnitudes, end))
    del magnitudes
    order = b.reshape(-1).argsort(stable=True)
    result = flat.clone()
    taken = taken != outside
    result[order[taken]] = ordered[taken]
    return result.reshape(a.shape)


@merge_method(cut="tensor", workspace=1.0)
def randperm(a: Same, *, seed: Integer = 0, random: Random) -> Same:
    """The rows in a random order.

    Formula: a'_i = a_p(i) along the first dimension, with p a permutation drawn for the key from ``seed``

    It is a means to test methods with, which permutes every key by itself: a network merged so computes something else.
    Permutations that leave what a network computes as it is join many keys, and belong to alignment.

    Spaces: a weight gives a weight, a delta a delta. It costs a copy.

    Source: sd-mecha has the name for such a permutation of a whole network.

    >>> from torch import tensor
    >>> from remelt.core.random import Random
    >>> drawn = Random(seed=0, method="randperm", key="w", offset=0, size=3)
    >>> sorted(randperm.on(tensor([1.0, 2.0, 3.0]), random=drawn).tolist())
    [1.0, 2.0, 3.0]
    """
    if a.dim() == 0:
        return a
    drawn = dataclasses.replace(random, size=a.shape[0]).uniform()
    return a[torch.from_numpy(drawn.argsort(kind="stable")).to(a.device)]


def _region(width: float, offset: float, count: int) -> tuple[int, int, bool]:
    """The first and the end of a region of ``count`` places, and whether it is all that is outside of them.

    >>> _region(0.5, 0.25, 8), _region(0.5, 0.75, 8), _region(-0.25, 0.0, 8)
    ((2, 6, False), (2, 6, True), (6, 8, False))
    """
    start = math.fmod(offset + min(width, 0.0), 1.0)
    start += 1.0 if start < 0.0 else 0.0
    end = start + min(abs(width), 1.0)
    if end <= 1.0:
        return round(start * count), round(end * count), False
    return round((end - 1.0) * count), round(start * count), True


def _least(magnitudes: Tensor, place: int) -> Tensor | float:
    """The magnitude that has a place in the order of all, counted from 1."""
    return magnitudes.kthvalue(place).values if place > 0 else -1.0
