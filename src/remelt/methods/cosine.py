"""Cosine methods: how alike two tensors are, column by column, says how far one moves towards the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remelt.recipe.method import Mask, Shortcut, Weight, merge_method

_BLOCK = 2**14
"""Elements whose products are taken in double precision at once."""
_AT_ALPHA_1 = (Shortcut("alpha", 1.0, "b"),)


@merge_method(cut="tensor", shortcuts=_AT_ALPHA_1, workspace=4.0)
def add_cosine_a(a: Weight, b: Weight, *, alpha: Mask = 1.0) -> Weight:
    """Move ``a`` towards ``b``, less in columns that point the same way.

    Formula: (1 - k) a + k b, with k = 1 - min(max(s - alpha, 0), 1) and s the cosine between the columns of ``a`` and
    ``b`` (along the first dimension; whole vectors where there is no other); a column of zeros has cosine 0

    Spaces: two weights give a weight. At ``alpha`` 0 equal columns stay and orthogonal ones are those of ``b``; the
    higher ``alpha``, the more is of ``b``, and at 1 all is. Needs both tensors whole in memory.

    Source: "cosineA" of supermerger, after losslessmix; as in sd-mecha, where similarity is not spread over all keys.

    >>> from torch import tensor
    >>> add_cosine_a.on(tensor([[1.0, 1.0], [0.0, 1.0]]), tensor([[2.0, 1.0], [0.0, -1.0]]), alpha=0.25)
    tensor([[ 1.2500,  1.0000],
            [ 0.0000, -1.0000]])
    """
    return _moved(a, b, alpha, _cosines(*_products_of_columns(a, b)))


@merge_method(cut="tensor", shortcuts=_AT_ALPHA_1, workspace=4.0)
def add_cosine_b(a: Weight, b: Weight, *, alpha: Mask = 1.0) -> Weight:
    """Move ``a`` towards ``b``, less in columns that point the same way, and less where the tensors do.

    Formula: (1 - k) a + k b, with k = 1 - min(max(s - alpha, 0), 1) and s the mean of the cosine between the columns
    of ``a`` and ``b`` and of that between the whole tensors; zeros have cosine 0

    Spaces: two weights give a weight. As `add_cosine_a`, but with one opinion on the tensor as a whole. Needs both
    tensors whole in memory.

    Source: "cosineB" of supermerger, after losslessmix; as in sd-mecha, where similarity is not spread over all keys.

    >>> from torch import tensor
    >>> add_cosine_b.on(tensor([[1.0, 1.0], [0.0, 0.0]]), tensor([[1.0, -1.0], [0.0, 0.0]]), alpha=0.25)
    tensor([[ 1., -1.],
            [ 0.,  0.]])
    """
    products = _products_of_columns(a, b)
    whole = _cosines(*(product.sum() for product in products))
    return _moved(a, b, alpha, (_cosines(*products) + whole) / 2.0)


def _products_of_columns(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``a . b``, ``a . a`` and ``b . b`` of each column, in float64."""
    columns = a.shape[1:]
    x, y = (a, b) if a.dim() else (a.reshape(1), b.reshape(1))
    rows = max(_BLOCK // max(columns.numel(), 1), 1)
    found = tuple(torch.zeros(columns, dtype=torch.float64, device=a.device) for _ in range(3))
    for begin in range(0, len(x), rows):
        some_x, some_y = x[begin : begin + rows].double(), y[begin : begin + rows].double()
        for total, (one, other) in zip(found, ((some_x, some_y), (some_x, some_x), (some_y, some_y)), strict=True):
            total += (one * other).sum(0)
    return found[0], found[1], found[2]


def _cosines(product: Tensor, square_a: Tensor, square_b: Tensor) -> Tensor:
    """Cosines from products; 0 where one has no direction."""
    norms = square_a.sqrt() * square_b.sqrt()
    return torch.where(norms == 0.0, norms, product / norms).clamp(-1.0, 1.0)


def _moved(a: Tensor, b: Tensor, alpha: Any, similarity: Tensor) -> Tensor:
    """The point between ``a`` and ``b``, nearer to ``a`` where they are alike."""
    share = 1.0 - (similarity.to(a.dtype) - alpha).clamp(0.0, 1.0)
    return torch.lerp(a, b, share)
