"""Cosine methods: how alike two tensors are, column by column, says how far one moves towards the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remelt.core.tensor_info import width_of_rows
from remelt.recipe.method import Mask, Shortcut, Sums, Weight, merge_method

_AT_ALPHA_1 = (Shortcut("alpha", 1.0, "b"),)


def products_of_columns(a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
    """Partial sums of some rows: ``a . b``, ``a . a`` and ``b . b`` of each column, in float64."""
    x, y = a.double(), b.double()
    return {"ab": (x * y).sum(0), "aa": (x * x).sum(0), "bb": (y * y).sum(0)}


def _bytes_of_columns(shape: tuple[int, ...]) -> int:
    """What these take for each of two operands."""
    return 3 * 8 * width_of_rows(shape, "column") // 2


BY_COLUMN: dict[str, Any] = {
    "cut": "row",
    "vectors": "column",
    "reductions": (products_of_columns,),
    "held": _bytes_of_columns,
    "workspace": 4.0,
}
"""What methods declare that ask for the products of columns."""


@merge_method(**BY_COLUMN, shortcuts=_AT_ALPHA_1)
def add_cosine_a(a: Weight, b: Weight, *, alpha: Mask = 1.0, sums: Sums) -> Weight:
    """Move ``a`` towards ``b``, less in columns that point the same way.

    Formula: (1 - k) a + k b, with k = 1 - min(max(s - alpha, 0), 1) and s the cosine between the columns of ``a`` and
    ``b`` (along the first dimension; whole vectors where there is no other); a column of zeros has cosine 0

    Spaces: two weights give a weight. At ``alpha`` 0 equal columns stay and orthogonal ones are those of ``b``; the
    higher ``alpha``, the more is of ``b``, and at 1 all is. Both tensors are read twice.

    Source: "cosineA" of supermerger, after losslessmix; as in sd-mecha, where similarity is not spread over all keys.

    >>> from torch import tensor
    >>> add_cosine_a.on(tensor([[1.0, 1.0], [0.0, 1.0]]), tensor([[2.0, 1.0], [0.0, -1.0]]), alpha=0.25)
    tensor([[ 1.2500,  1.0000],
            [ 0.0000, -1.0000]])
    """
    return _moved(a, b, alpha, _cosines(sums))


@merge_method(**BY_COLUMN, shortcuts=_AT_ALPHA_1)
def add_cosine_b(a: Weight, b: Weight, *, alpha: Mask = 1.0, sums: Sums) -> Weight:
    """Move ``a`` towards ``b``, less in columns that point the same way, and less where the tensors do.

    Formula: (1 - k) a + k b, with k = 1 - min(max(s - alpha, 0), 1) and s the mean of the cosine between the columns
    of ``a`` and ``b`` and of that between the whole tensors; zeros have cosine 0

    Spaces: two weights give a weight. As `add_cosine_a`, but with one opinion on the tensor as a whole. Both tensors
    are read twice.

    Source: "cosineB" of supermerger, after losslessmix; as in sd-mecha, where similarity is not spread over all keys.

    >>> from torch import tensor
    >>> add_cosine_b.on(tensor([[1.0, 1.0], [0.0, 0.0]]), tensor([[1.0, -1.0], [0.0, 0.0]]), alpha=0.25)
    tensor([[ 1., -1.],
            [ 0.,  0.]])
    """
    whole = _cosines({name: sums[name].sum() for name in ("ab", "aa", "bb")})
    return _moved(a, b, alpha, (_cosines(sums) + whole) / 2.0)


def _cosines(sums: Mapping[str, Tensor]) -> Tensor:
    """Cosines from products; 0 where one has no direction."""
    norms = sums["aa"].sqrt() * sums["bb"].sqrt()
    return torch.where(norms == 0.0, norms, sums["ab"] / norms).clamp(-1.0, 1.0)


def _moved(a: Tensor, b: Tensor, alpha: Any, similarity: Tensor) -> Tensor:
    """The point between ``a`` and ``b``, nearer to ``a`` where they are alike."""
    share = 1.0 - (similarity.to(a) - alpha).clamp(0.0, 1.0)
    return torch.lerp(a, b, share)
