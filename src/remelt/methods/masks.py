"""Masks from how three models lie to each other, and differences that are added through them."""

from __future__ import annotations

import torch
from torch import Tensor

from remelt.recipe.method import Mask, Same, Shortcut, merge_method

_AT_ALPHA_0 = (Shortcut("alpha", 0.0, "a"),)


def _trained(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """How much further ``b`` is from ``a`` than from ``c``, between 0 and 1."""
    way = (b - a).abs()
    return _share(way, way + (b - c).abs())


def _opposite(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """How far ``a`` and ``b`` went from ``c`` in opposite directions, between 0 and 1."""
    x, y = a - c, b - c
    way = (x - y).abs()
    return _share(way, way + (x + y).abs())


def _strictly_opposite(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The lesser of the ways from ``c`` to ``a`` and ``b`` by the greater, where they are opposite; else 0."""
    x, y = a - c, b - c
    greater = torch.maximum(x.abs(), y.abs())
    opposed = -(x / greater) * (y / greater)
    return torch.where(greater == 0.0, greater, torch.where(opposed <= 0.0, 0.0, opposed))


def _share(part: Tensor, total: Tensor) -> Tensor:
    """A part of a total that is not negative; 0 where that is 0."""
    return torch.where(total == 0.0, total, part / total)


@merge_method(cut="element", workspace=7.0)
def train_difference_mask(a: Same, b: Same, c: Same, *, alpha: Mask = 1.0) -> Mask:
    """How much of a difference ``b - c`` training would add to ``a``, as a mask.

    Formula: 1.8 alpha |b - a| / (|b - a| + |b - c|); 0 where the three are equal

    Spaces: three weights or three deltas give a param, to be multiplied by ``b - c`` or to stand where a mask is due.
    It costs one pass. `train_difference` uses it at once.

    Source: "trainDifference" of supermerger; the mask of sd-mecha.

    >>> from torch import tensor
    >>> train_difference_mask.on(tensor([0.0, 1.0]), tensor([1.0, 1.0]), tensor([0.0, 0.0]))
    tensor([0.9000, 0.0000])
    """
    return 1.8 * alpha * _trained(a, b, c)


@merge_method(cut="element", workspace=7.0)
def add_opposite_mask(a: Same, b: Same, c: Same, *, alpha: Mask = 1.0) -> Mask:
    """Where ``a`` and ``b`` went from ``c`` in opposite directions, as a mask.

    Formula: 2 alpha |a - b| / (|a - b| + |a + b - 2 c|); 0 where the three are equal

    Spaces: three weights or three deltas give a param: ``alpha`` where only one of them left ``c``, twice that where
    both did equally in opposite directions, 0 where they went together. It costs one pass. `add_opposite` uses it.

    Source: sd-mecha, add_opposite_mask.

    >>> from torch import tensor
    >>> add_opposite_mask.on(tensor([1.0, 1.0, 1.0]), tensor([-1.0, 0.0, 1.0]), tensor([0.0, 0.0, 0.0]))
    tensor([2., 1., 0.])
    """
    return 2.0 * alpha * _opposite(a, b, c)


@merge_method(cut="element", workspace=7.0)
def add_strict_opposite_mask(a: Same, b: Same, c: Same, *, alpha: Mask = 1.0) -> Mask:
    """Where both ``a`` and ``b`` left ``c``, and in opposite directions, as a mask.

    Formula: 2 alpha max(0, (c - a) (b - c) / max(|a - c|, |b - c|)^2); 0 where the three are equal

    Spaces: three weights or three deltas give a param: twice ``alpha`` where both went equally in opposite
    directions, 0 wherever one of them stayed or they went together. It costs one pass. `add_strict_opposite` uses it.

    Source: sd-mecha, add_strict_opposite_mask.

    >>> from torch import tensor
    >>> add_strict_opposite_mask.on(tensor([1.0, 1.0, 1.0]), tensor([-1.0, 0.0, -0.5]), tensor([0.0, 0.0, 0.0]))
    tensor([2., 0., 1.])
    """
    return 2.0 * alpha * _strictly_opposite(a, b, c)


@merge_method(cut="element", spreads=True, shortcuts=_AT_ALPHA_0, workspace=7.0)
def train_difference(a: Same, b: Same, c: Same, *, alpha: Mask = 1.0) -> Same:
    """Add to ``a`` what ``b`` learned since ``c``, less where ``a`` is near ``b`` already.

    Formula: a + 1.8 alpha (b - c) |b - a| / (|b - a| + |b - c|); a where the three are equal

    Spaces: three weights or three deltas give the same. Instead of an add-difference that burns: what ``a`` knows
    already is not added again. It costs one pass; at ``alpha`` 0 only ``a`` is read.

    Source: "trainDifference" of supermerger; sd-mecha 0.0.29.

    >>> from torch import tensor
    >>> train_difference.on(tensor([0.0, 1.0]), tensor([1.0, 1.0]), tensor([0.0, 0.0]))
    tensor([0.9000, 1.0000])
    """
    return _added(a, b, c, 1.8 * alpha * _trained(a, b, c))


@merge_method(cut="element", spreads=True, shortcuts=_AT_ALPHA_0, workspace=7.0)
def add_opposite(a: Same, b: Same, c: Same, *, alpha: Mask = 1.0) -> Same:
    """Add to ``a`` what ``b`` has over ``c``, most where ``a`` went from ``c`` the other way.

    Formula: a + 2 alpha (b - c) |a - b| / (|a - b| + |a + b - 2 c|); a where the three are equal

    Spaces: three weights or three deltas give the same. For two fine-tunes of ``c``: what both learned is not added
    again. It costs one pass; at ``alpha`` 0 only ``a`` is read.

    Source: sd-mecha 0.0.29, add_opposite.

    >>> from torch import tensor
    >>> add_opposite.on(tensor([1.0, 0.0, 1.0]), tensor([-1.0, 1.0, 1.0]), tensor([0.0, 0.0, 0.0]))
    tensor([-1.,  1.,  1.])
    """
    return _added(a, b, c, 2.0 * alpha * _opposite(a, b, c))


@merge_method(cut="element", spreads=True, shortcuts=_AT_ALPHA_0, workspace=7.0)
def add_strict_opposite(a: Same, b: Same, c: Same, *, alpha: Mask = 1.0) -> Same:
    """Add to ``a`` what ``b`` has over ``c``, only where ``a`` went from ``c`` the other way.

    Formula: a + 2 alpha (b - c) max(0, (c - a) (b - c) / max(|a - c|, |b - c|)^2); a where the three are equal

    Spaces: three weights or three deltas give the same. Changes nothing but the elements that two fine-tunes of ``c``
    disagree on. It costs one pass; at ``alpha`` 0 only ``a`` is read.

    Source: sd-mecha 0.0.29, where it was clamped_add_opposite.

    >>> from torch import tensor
    >>> add_strict_opposite.on(tensor([1.0, 0.0, 1.0]), tensor([-1.0, 1.0, 1.0]), tensor([0.0, 0.0, 0.0]))
    tensor([-1.,  0.,  1.])
    """
    return _added(a, b, c, 2.0 * alpha * _strictly_opposite(a, b, c))


def _added(a: Tensor, b: Tensor, c: Tensor, mask: Tensor) -> Tensor:
    """The difference of ``b`` and ``c`` added to ``a`` through a mask."""
    return a + mask * (b - c)
